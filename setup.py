"""Map the repository root onto the import package ``omnissm``; metadata is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs", "configs")
found = find_namespace_packages(include=[pattern for f in FOLDERS for pattern in (f, f + ".*")])

setup(
    script_name="setup.py",  # or build_py copies this file into the wheel as omnissm/setup.py
    package_dir={"omnissm": "."},
    packages=["omnissm", *("omnissm." + name for name in found)],
)

"""The verbs `fit`, `validate`, `test` and `predict`: Lightning's command line with one folder per run.

runs/NAME/config.yaml      what was run; runs again with -c
runs/NAME/checkpoints/     best.ckpt by the task's monitored metric, last.ckpt to resume from
runs/NAME/metrics.csv      metrics by step; earlier parts of a resumed run are metrics.1.csv, ...
runs/NAME/metrics.json     what test and validate found
runs/NAME/model/           the best weights as a model folder
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from pytorch_lightning.callbacks import LearningRateMonitor, ProgressBar, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table

from .callbacks import BestCheckpoint, ResumePoint, is_dry, prepare_trainer
from .checkpoints import check_writable, export_checkpoint, load_weights, network_state, read_checkpoint, read_weights
from .data import SSMData
from .export import best_checkpoint
from .logs import MetricsFile
from .messages import dead_worker, explain, unknown_metric
from .runs import STOPPED, Run, check_configs
from .task import NonFiniteError, SSMTask
from .trainer_options import check_trainer_options

LINKS = (
    "n_variates", "lookback", "horizon", "covariates", "num_classes", "vocab_size", "vocabulary", "schema",
    "image_size",
)  # fmt: skip

_CHECKPOINT = {
    "checkpoint.mode": "min",
    "checkpoint.filename": "best",
    "checkpoint.save_top_k": 1,
    "checkpoint.save_last": False,
    "checkpoint.auto_insert_metric_name": False,
    "checkpoint.enable_version_counter": False,
}

log = logging.getLogger(__name__)


def run_cli(argv: Sequence[str], verb: str, domain: str) -> int:
    """Run one Lightning verb of a domain.

    Args:
        argv: Words after the verb. `sys.argv` is left alone: distributed launchers start other processes from it.
        verb: "fit", "validate", "test" or "predict".
        domain: Package whose `tasks` and `data` classes may be named without their module.

    Returns:
        0.

    Raises:
        ValueError: for anything wrong with the arguments, in one line.
        ChildProcessError: if a process that loads data has ended.
    """
    quiet()
    for part in ("tasks", "data"):
        if find_spec(f"omnissm.{domain}") and find_spec(f"omnissm.{domain}.{part}"):
            import_module(f"omnissm.{domain}.{part}")
    try:
        CLI(argv, verb, domain)
    except RuntimeError as error:
        if said := dead_worker(error):
            raise ChildProcessError(said) from error
        raise
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ is not None and str(cause).startswith(("Call to compute_fn", "Does not validate")):
            cause = cause.__cause__
        if cause is error:
            raise
        raise cause from None  # what the task or data module said, without the parser's frame around it
    return 0


def quiet() -> None:
    """Silence messages of the trainer that say nothing about the user's run, unless debug logs are on."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they speak to callers of its interface
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*configure_optimizers. returned .None.")  # nothing to train: as asked
    warnings.filterwarnings("ignore", message=".training_step. returned .None.")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*exists and is not empty. Previous log files")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    # metrics of parts are those of all processes already
    warnings.filterwarnings("ignore", message=r"It is recommended to use .self\.log\('(val|test)/")
    warnings.filterwarnings("ignore", message=".*could not find the monitored key")  # without validation: said by `fit`
    warnings.filterwarnings("ignore", message=".*checkpoint that ended before the epoch ended")
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
            logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line that names close options."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raise instead of printing the usage."""
        raise ValueError(explain(message, self)) from ex

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help with one line of usage instead of all options twice."""
        _, _, rest = super().format_help(*args, **kwargs).partition("\n\n")
        name = self.prog.replace("[options] ", "")
        return f"usage: {name} -c NAME_OR_FILE [-c ...] [--run NAME] [--OPTION VALUE ...]\n\n{rest}"


class CLI(LightningCLI):
    """One verb: parses, builds data module and task, prepares the run's folder and the trainer, and runs.

    Args:
        argv: Words after the verb.
        verb: "fit", "validate", "test" or "predict".
        domain: Shown in the help.
    """

    def __init__(self, argv: Sequence[str], verb: str, domain: str) -> None:
        self.verb, self.domain = verb, domain
        self.started = time.perf_counter()
        example = f"omnissm {domain} {verb} -c {domain}/NAME" + (" --run first" if verb == "fit" else "")
        own = {"description": inspect.getdoc(getattr(type(self), verb)), "epilog": f"example: {example}"}
        words = Run.add_config(argv, verb)
        check_configs(words)
        try:
            super().__init__(
                SSMTask,
                SSMData,
                save_config_callback=None,
                trainer_defaults={"enable_model_summary": False},
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={
                    "prog": f"omnissm {domain}",
                    "allow_abbrev": False,
                    verb: {"allow_abbrev": False, "prog": f"omnissm {domain} {verb}", **own},
                },
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                args=[verb, *words],
            )
        finally:
            if hasattr(self, "run"):
                self.run.lock.release()

    def _setup_parser_kwargs(self, parser_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        sub = {key: value for key, value in parser_kwargs.items() if key in LightningCLI.subcommands()}
        return {key: value for key, value in parser_kwargs.items() if key not in sub}, sub

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one verb, and the trainer's arguments that are not options of it."""
        skip = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
        skip |= {"ckpt_path"} if self.verb == "fit" else {"verbose", "return_predictions"}
        own = set(inspect.signature(getattr(pl.Trainer, self.verb)).parameters)
        return {self.verb: skip & own}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the run, first in the help."""
        about = "name of the run's folder below runs/, or a path with a slash (default: the configuration's name)"
        parser.add_argument("--run", type=str | None, default=None, help=about)
        about = "threads of torch on the CPU; small models are fastest on one (default: as torch decides)"
        parser.add_argument("--threads", type=PositiveInt | None, default=None, help=about)
        if self.verb == "fit":
            parser.add_argument("--resume", action="store_true", help="go on from the run's last.ckpt")
            parser.add_argument("--overwrite", action="store_true", help="replace a run of this name")
            about = "least seconds between the states that --resume goes on from; 0 keeps one at each epoch's start"
            parser.add_argument("--state_seconds", type=NonNegativeFloat, default=5.0, help=about)
            parser.add_argument(
                "--init_from", type=str | None, default=None, help="model folder or .ckpt, weights only"
            )
            parser.add_argument("--init_strict", type=bool, default=True, help="refuse weights that do not fit")
        super().add_default_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The checkpoint callback, and the links from data module to task."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults(_CHECKPOINT)
        for name in LINKS:
            parser.link_arguments("data", f"model.init_args.{name}", self._reader(name), apply_on="instantiate")

    def _reader(self, name: str) -> Callable[[Any], Any]:
        def read(data: SSMData) -> Any:
            if not hasattr(data, name) and name in self._task_parameters():
                raise ValueError(f"{type(data).__name__} has no `{name}`, which the task needs; it must set it.")
            return getattr(data, name, None)

        read.__name__ = f"{name}_of"  # as the help shows it
        return read

    def _task_parameters(self) -> set[str]:
        module, _, name = self._get(self.config, "model").class_path.rpartition(".")
        return set(inspect.signature(getattr(import_module(module), name)).parameters)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as given: the one stored in a checkpoint must not override it silently."""

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder before anything costly."""
        config = self.config[self.verb]
        check_trainer_options(config.trainer.as_dict(), "trainer.")
        if config.threads:
            torch.set_num_threads(config.threads)
        self.run = Run.create(config.get("run"), [str(path) for path in config.get("config") or []], config.model)
        if self.verb == "fit":
            self.run.check(self._config_yaml(), resume=config.resume, overwrite=config.overwrite)
        elif not config.trainer.fast_dev_run:
            check_writable(self.run.folder)

    def _config_yaml(self) -> str:
        config: Namespace = self.config[self.verb].clone()
        for key in ("config", "resume", "overwrite", "init_from", "init_strict", "state_seconds"):
            config.pop(key, None)  # of this start alone, and unknown to the other verbs
        config["run"] = self.run.name
        return self._parser(self.verb).dump(config, skip_none=False)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Trainer with the run's logger, checkpoints, progress bar on stderr and state to resume from."""
        config = self.config_init[self.verb]
        checkpoint: BestCheckpoint = config.checkpoint
        checkpoint.dirpath = str(self.run.checkpoints.absolute())
        checkpoint.monitor = checkpoint.monitor or self.model.monitor
        options = config.trainer
        callbacks = options.callbacks if isinstance(options.callbacks, list) else [options.callbacks]
        callbacks = [callback for callback in callbacks if callback is not None]
        if options.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
        if self.verb != "fit":
            kwargs["logger"] = False
        elif options.logger in (None, True):
            kwargs["logger"] = MetricsFile(self.run.folder / "metrics.csv")
            if not any(isinstance(callback, LearningRateMonitor) for callback in callbacks):
                callbacks.append(LearningRateMonitor(logging_interval="step"))
        trainer = super().instantiate_trainer(
            callbacks=callbacks, default_root_dir=options.default_root_dir or str(self.run.folder), **kwargs
        )
        seed = int(config.seed_everything or 0)
        self.datamodule.run_seed = seed
        begin = None if self.verb != "fit" or is_dry(trainer) else self._begin
        seconds = config.state_seconds if self.verb == "fit" else 0.0
        return prepare_trainer(trainer, self.run.checkpoints, seed, begin, seconds)

    def _begin(self) -> None:
        """Take the run's folder: the first batch has been learned from."""
        self.run.claim(self._config_yaml(), resume=self.config_init[self.verb].resume)
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.begin()

    def fit(self, model: SSMTask, datamodule: SSMData, **options: Any) -> None:
        """Train, keep the best weights, and write them as a model folder."""
        config = self.config_init[self.verb]
        if config.init_from:
            misfit = load_weights(
                model.net, read_weights(config.init_from), strict=config.init_strict, source=config.init_from
            )
            if misfit:
                log.warning("Weights of %s that did not fit are left out: %s", config.init_from, misfit)
        try:
            if not is_dry(self.trainer):
                self.run.open()
            start = self.run.state() if config.resume else None  # none: killed before one was written
            path = str(start) if start else None
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=path, weights_only=True, **options)
        except (SystemExit, KeyboardInterrupt) as stop:  # the trainer answers an interrupt with the former
            sys.stderr.write(f"Interrupted. {self._left()}\n")
            raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from stop
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} {self._left(self.run.checkpoints / STOPPED)}") from error
        except Exception as error:
            left = self._left()
            said = dead_worker(error)
            if said and self.trainer.received_sigterm:  # sent to all processes: those that load data are gone first
                sys.stderr.write(f"Interrupted. {left}\n")
                raise SystemExit(143) from error
            if said:
                raise ChildProcessError(f"{said} {left}") from error
            if missing := unknown_metric(error):
                raise ValueError(f"{missing} {left}") from error
            if isinstance(error, OSError) and error.strerror and self._point.has_begun:
                place = f": {error.filename!r}" if error.filename else ""
                raise OSError(f"{error.strerror}{place}. {left}") from error
            raise
        if is_dry(self.trainer):
            return
        if not self._point.has_begun and not config.resume:
            raise ValueError(f"Nothing was trained: the run has no batches or no epochs. {self._left()}")
        self._point.begin()
        if not self.trainer.is_global_zero:
            return
        best = best_checkpoint(self.run.folder)
        export_checkpoint(best, self.run.folder / "model")
        found = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if best.name == "last.ckpt" and self.model.monitor not in found:
            log.warning("Nothing was validated, so no best.ckpt is kept and the model folder holds the last weights.")
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, BestCheckpoint) and checkpoint.best_model_score is not None:
            found[f"best {checkpoint.monitor}"] = float(checkpoint.best_model_score)
        self._report(found)

    @property
    def _point(self) -> ResumePoint:
        return next(c for c in self.trainer.callbacks if isinstance(c, ResumePoint))  # type: ignore[attr-defined]

    def _left(self, weights: Path | None = None) -> str:
        """What a fit that has ended early leaves, and the way on; removes what is of no use."""
        if is_dry(self.trainer):
            return ""
        if not self._point.has_begun:
            self.run.leave_nothing()
            return f"Run {self.run.name!r} is as it was." if self.run.newest else "Nothing was written."
        command = f"omnissm {self.domain} fit --run {self.run.name}"
        if weights is not None:
            return f"The weights before it are in {weights}."
        return f"The state at the start of epoch {self._point.epoch} is kept; go on with: {command} --resume"

    def validate(self, model: SSMTask, datamodule: SSMData, ckpt_path: str | None = None) -> None:
        """Metrics of a trained model on the validation part, also written to metrics.json."""
        self._evaluate(model, datamodule, ckpt_path, self.trainer.validate)

    def test(self, model: SSMTask, datamodule: SSMData, ckpt_path: str | None = None) -> None:
        """Metrics of a trained model on the test part, also written to metrics.json."""
        self._evaluate(model, datamodule, ckpt_path, self.trainer.test)

    def _evaluate(self, model: SSMTask, datamodule: SSMData, ckpt_path: str | None, verb: Callable[..., Any]) -> None:
        path = self._checkpoint(model, ckpt_path)
        results = verb(model, datamodule=datamodule, ckpt_path=path, weights_only=True, verbose=False)
        if self.trainer.is_global_zero and not is_dry(self.trainer):
            found = {name: float(value) for result in results for name, value in result.items()}
            self.run.write_metrics(found, model, path, self.config[self.verb].seed_everything)
            self._report(found)

    def predict(self, model: SSMTask, datamodule: SSMData, ckpt_path: str | None = None) -> None:
        """Outputs of a trained model on the test part in the model's units, written to predictions.safetensors."""
        path = self._checkpoint(model, ckpt_path)
        outputs = self.trainer.predict(model, datamodule=datamodule, ckpt_path=path, weights_only=True)
        if self.trainer.is_global_zero and outputs:
            sys.stdout.write(f"{self.run.write_predictions(outputs)}\n")

    def _checkpoint(self, model: SSMTask, given: str | None) -> str | None:
        """The checkpoint to read, after comparing it with the model; None for a model with nothing to load."""
        path = Path(given) if given else None
        if path is None:
            try:
                path = best_checkpoint(self.run.folder)
            except FileNotFoundError as error:
                if any(True for _ in model.net.parameters()):
                    raise FileNotFoundError(f"{error} Or give --ckpt_path.") from None
                return None
        else:
            path = best_checkpoint(path)
        state = network_state(read_checkpoint(path))
        try:
            load_weights(model.net, state, source=str(path))
        except ValueError as error:
            own = f"--run {self.run.name} without -c takes the run's own configuration."
            raise ValueError(f"{error} {own}") from error
        return str(path)

    def _report(self, found: dict[str, float]) -> None:
        table = Table(title=f"{self.verb}: {self.run.name}", show_header=False)
        for name, value in found.items():
            if not name.startswith("lr-"):
                table.add_row(name, f"{value:.6g}")
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        table.add_row("parameters", f"{parameters:,}")
        table.add_row("seconds", f"{time.perf_counter() - self.started:.1f}")
        table.add_row("folder", str(self.run.folder))
        Console().print(table)

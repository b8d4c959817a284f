"""The task of distillation: stages follow each other, the teacher stays, and the student is found again."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import omnissm
from omnissm.ssmcore import SequenceModel, Stack
from omnissm.ssmcore.distill import convert
from omnissm.ssmcore.training import Distillation
from omnissm.ssmcore.training.checkpoints import load_weights, network_state
from omnissm.ssmcore.training.distillation import read_batch


class Batch(NamedTuple):
    tokens: Tensor
    mask: Tensor
    seq_idx: Tensor | None = None


class Picture(NamedTuple):
    image: Tensor
    label: Tensor


def teacher() -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(16, "T2", vocab_size=8, mixer_options={"nheads": 4}, mlp_hidden=16)


def batches(count: int, padded: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(8, (8 * count, 12), generator=generator)
    mask = torch.ones_like(rows, dtype=torch.bool)
    if padded:
        mask[::2, 9:] = False
    return DataLoader([Batch(*pair) for pair in zip(rows, mask, strict=True)], batch_size=8, collate_fn=stacked)


def stacked(rows: list[Batch]) -> Batch:
    return Batch(torch.stack([row.tokens for row in rows]), torch.stack([row.mask for row in rows]))


def trainer(folder, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, **quiet, **options)


@pytest.mark.parametrize("keep", [None, {"stack.blocks.0.mixer": [2]}], ids=["none", "one"])
def test_a_run_goes_through_its_stages(tmp_path, keep):
    model = teacher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = Distillation(
        model, keep=keep, shares=(0.25, 0.25, 0.5), optimizer=lambda groups: torch.optim.AdamW(groups, 3e-3)
    )
    seen: list[float] = []
    task.on_train_batch_end = lambda *_: seen.append(float(task.trainer.callback_metrics["train/stage"]))
    run = trainer(tmp_path, max_epochs=5)
    first = run.validate(task, batches(2, padded=True), verbose=False)[0]
    run.fit(task, batches(8, padded=True))
    assert seen == [0.0] * 10 + [1.0] * 10 + [2.0] * 20
    last = run.validate(task, batches(2, padded=True), verbose=False)[0]
    assert 0 <= last["val/kl"] < 0.5 * first["val/kl"]
    assert last["val/loss"] > last["val/kl"]
    assert first["val/teacher_nats"] == pytest.approx(last["val/teacher_nats"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(name.startswith("net.") for name in saved["state_dict"])
    again = convert(teacher(), saved["omnissm"]["config"]["args"]["keep"])
    load_weights(again, network_state(saved))
    ids = torch.randint(8, (2, 12))
    assert torch.equal(again.eval()(ids), task.net.eval()(ids))


def test_a_student_that_keeps_everything_is_at_no_distance(tmp_path):
    model = teacher()
    task = Distillation(model, keep={f"stack.blocks.{layer}.mixer": list(range(4)) for layer in range(2)})
    found = trainer(tmp_path).validate(task, batches(1), verbose=False)[0]
    assert found["val/kl"] == pytest.approx(0, abs=1e-6)
    assert found["val/agreement"] == 1
    assert found["val/nats"] == found["val/teacher_nats"]


def test_the_rest_can_stay_as_it_is():
    task = Distillation(teacher(), keep={"stack.blocks.0.mixer": [2]}, train_rest=False)
    trained = {name for name, parameter in task.net.named_parameters() if parameter.requires_grad}
    assert {name.split(".mixer.")[0] for name in trained} == {"stack.blocks.0", "stack.blocks.1"}
    assert all(".mixer.second." in name for name in trained if name.startswith("stack.blocks.0"))
    assert "stack.blocks.1.mixer.in_proj.weight" in trained


def test_teachers_of_images():
    """Any model with `Attention` inside; the batch says what it is called with."""

    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 4, 4)
            self.stack = Stack(8, [{"mixer": "attention", "nheads": 2, "causal": False}])
            self.head = torch.nn.Linear(8, 5)

        def forward(self, image):
            return self.head(self.stack(self.patches(image).flatten(2).mT).mean(1))

    task = Distillation(Images())
    batch = Picture(torch.randn(2, 3, 8, 8), torch.zeros(2))
    for step, stage in enumerate(("matrix", "hidden", "logits")):
        assert task.stage(step * 3, 10) == stage
    x, options = read_batch(batch)
    assert task.net(x, **options).shape == (2, 5)


def test_a_teacher_of_dna_by_the_command_line(tmp_path, monkeypatch):
    """The configuration that comes with the library, on little data; the student is found again in the model folder."""
    from omnissm import genomics
    from omnissm.genomics import data, tasks  # noqa: F401  the command line finds their classes
    from omnissm.genomics.models import save_pretrained
    from omnissm.ssmcore.training import read_model_folder
    from omnissm.ssmcore.training.cli import CLI, quiet

    quiet()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    size = {"d_model": [32], "attn_cfg": {"num_heads": [4], "rotary_emb_dim": [8], "window_size": [-1]}}
    dna = genomics.create_model("transformer_debug", d_intermediate=[32], **size)
    save_pretrained(dna, "runs/teacher/model")
    layer = "backbone.main_network.blocks.1.mixer"
    words = ["-c", str(Path(omnissm.__file__).parent / "configs/genomics/distill_transformer_debug_ecoli.yaml")]
    words += ["--data", "omnissm.genomics.data.SyntheticDNA", "--data.init_args.bases", "5000", "--run", "student"]
    words += ["--data.init_args.length", "64", "--data.init_args.batch_size", "8", "--data.init_args.epoch_size", "64"]
    words += ["--model.init_args.keep", json.dumps({layer: [0, 3]}), "--trainer.max_epochs", "1"]
    done = CLI([*words, "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"], "fit", "genomics")
    assert done.trainer.global_step == 8
    folder = read_model_folder("runs/student/model")
    assert folder.config["args"] == {"keep": {layer: [0, 3]}}
    student = convert(dna, folder.config["args"]["keep"])
    load_weights(student, folder.state)
    ids = torch.randint(4, (1, 20)) + 65
    torch.testing.assert_close(student.eval()(ids), done.model.net.cpu().eval()(ids))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="`shares` must be three shares"):
        Distillation(teacher(), shares=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        Distillation(teacher(), temperature=0)
    with pytest.raises(ValueError, match="`reader` must say how to read the teacher at runs/teacher"):
        Distillation("runs/teacher")
    with pytest.raises(ValueError, match="no attention to replace"):
        Distillation(Stack(8, "m1", mixer_options={"headdim": 8}))
    with pytest.raises(TypeError, match="expected a tensor, a tuple of tensors, or a batch"):
        read_batch({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="the stages share a run that has an end"):
        trainer(tmp_path, max_epochs=-1, max_steps=-1).fit(Distillation(teacher()), batches(1))

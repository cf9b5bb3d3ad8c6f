"""Files that the library writes: whole or not at all, no pickle, and a clear error for those cut short or of others."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import tuning
from safetensors.torch import save_file
from trainer_cases import feature, make

from alphatoken_loss import Fisher
from alphatoken_loss.files import read_tensors, write_tensors, write_whole
from alphatoken_loss.tools.cli import UserError
from alphatoken_loss.tools.report.samples import FOLDER, read_samples
from alphatoken_loss.tools.score.parts import Labelling, finish, read_meta, write_part
from alphatoken_loss.tools.score.rows import Tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a trainer's run: a Fisher, a checkpoint's state, samples."""
    folder = tmp_path_factory.mktemp("run")
    case = feature(max_steps=2, save_strategy="steps", save_steps=1, sample_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make("sft", tuning.TRAINERS["sft"][0], case, folder).train()
    return folder


def resume(folder):
    case = feature(max_steps=2)
    make("sft", tuning.TRAINERS["sft"][0], case, folder).train(resume_from_checkpoint=str(folder / "checkpoint-1"))


READ = {
    "fisher.safetensors": (lambda folder: Fisher.load(folder / "fisher.safetensors"), "saved Fisher"),
    "checkpoint-1/alphatoken.safetensors": (resume, r"state of token values \(delete it to resume"),
    f"{FOLDER}/step-000000001.safetensors": (lambda folder: list(read_samples(folder)), "sample of a run"),
}


def spoilt(how, whole):
    """What may lie in the place of a file: cut at several lengths, another format, a pickle, nothing."""
    if how == "foreign":
        return None
    if how == "pickle":
        return pickle.dumps({"a": torch.zeros(2)})
    return whole[: {"empty": 0, "header": 6, "half": len(whole) // 2, "end": len(whole) - 1}[how]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["empty", "header", "half", "end", "pickle", "foreign"])
@pytest.mark.parametrize("name", READ)
def test_files_that_are_cut_or_of_others(run, name, how):
    read, what = READ[name]
    path = run / name
    whole = path.read_bytes()
    content = spoilt(how, whole)
    try:
        if content is None:
            save_file({"a": torch.zeros(2)}, path)
        else:
            path.write_bytes(content)
        reason = "its format is None" if how == "foreign" else "not a safetensors file, or cut short"
        with pytest.raises(ValueError, match=f"{path.name} is no {what}.*{reason}"):
            read(run)
    finally:
        path.write_bytes(whole)


@pytest.mark.filterwarnings("ignore")
def test_whole_files_are_read(run):
    for read, _ in READ.values():
        read(run)
    for path in run.rglob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{", path  # safetensors' header, no pickle
    assert not [path for path in run.rglob(".*") if path.is_file()]  # nothing unfinished is left


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(2)}, kind="mine")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    tensors, _ = read_tensors(path, kind="mine", what="file of mine")
    assert torch.equal(tensors["a"], torch.ones(2)) and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_no_sample_by_its_name(run):
    there = [sample.step for sample in read_samples(run)]
    stray = run / FOLDER / "step-last.safetensors"
    stray.write_bytes(b"")
    assert [sample.step for sample in read_samples(run)] == there != []
    stray.unlink()


# ------------------------------------------------------------------------------------------- score's output


@pytest.fixture
def output(tmp_path):
    rows = [((Tokens([5, 6, 7, 8], [False, True, True, True]),), [torch.tensor([0.0, 1.0, 2.0, 3.0])])]
    (tmp_path / "scored").mkdir()
    write_part(tmp_path / "scored" / "part-00000.parquet", rows, 0, Labelling(0.5), "sft")
    (tmp_path / "meta.json").write_text('{"state": "scoring", "inputs": {}, "form": "sft", "rows": 1}')
    return tmp_path


def test_a_whole_part(output):
    finish(output, output, read_meta(output), Labelling(0.5))
    assert read_meta(output)["kept_tokens"] == 2


@pytest.mark.parametrize("scope", ["sequence", "dataset"])
@pytest.mark.parametrize("how", ["empty", "half", "end", "pickle", "foreign"])
def test_parts_that_are_cut_or_of_others(output, how, scope):
    part = output / "scored" / "part-00000.parquet"
    if how == "foreign":
        tuning.sft_data().to_parquet(part)
    else:
        part.write_bytes(spoilt(how, part.read_bytes()))
    with pytest.raises(UserError, match=r"part-00000.parquet: cannot be read \(.*\)\. Delete it and run the command"):
        finish(output, output, read_meta(output), Labelling(0.5, scope))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": "done"}', "null"])
def test_a_foreign_meta(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match="is no output of `alphatoken score`"):
        read_meta(tmp_path)

"""What a trainer's checkpoint holds so that a resumed run masks as an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from ..directions.fisher import Fisher
from ..files import read_tensors, write_tensors
from .running import Running

logger = get_logger(__name__)

FISHER_FILE = "fisher.safetensors"
STATE_FILE = "alphatoken.safetensors"
_KIND = "alphatoken_loss.state.1"
_STEPS = "steps|"  # no parameter's name holds a bar


class Checkpoints(Running):
    """The part of [`AlphaTokenMixin`] that saves and loads target and estimator state, and loads the Fisher."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._gate is None or not self._gate.selection.valued or not self.args.should_save:
            return
        state = self._gate.state_dict()
        about = {name: state[name] for name in ("estimator", "age", "turn", "tokens")}
        tensors = {**state["target"], **{f"{_STEPS}{name}": tensor for name, tensor in state["steps"].items()}}
        write_tensors(Path(output_dir) / STATE_FILE, tensors, kind=_KIND, about={"about": json.dumps(about)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        checkpoint, gate = Path(resume_from_checkpoint), self._gate
        if gate is None or not gate.selection.valued:
            return
        if gate.fisher is None and (checkpoint.parent / FISHER_FILE).is_file():
            gate.source.fisher = Fisher.load(checkpoint.parent / FISHER_FILE)
        if not (checkpoint / STATE_FILE).is_file():
            logger.warning(f"{checkpoint} has no {STATE_FILE}, so the target is estimated anew and masks may differ.")
            begun = {"applied": torch.tensor(True)}  # or path_start would go back to theta*
            gate.load_state_dict({"target": {}, "tokens": 0, "age": 0, "turn": 0, "steps": begun})
            return
        what = "state of token values (delete it to resume with a target that is estimated anew)"
        tensors, words = read_tensors(checkpoint / STATE_FILE, kind=_KIND, what=what)
        target = {name: tensor for name, tensor in tensors.items() if not name.startswith(_STEPS)}
        steps = {name.removeprefix(_STEPS): tensor for name, tensor in tensors.items() if name not in target}
        gate.load_state_dict({**json.loads(words["about"]), "target": target, "steps": steps})

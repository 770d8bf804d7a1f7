"""Save, load, retain, consolidate. A checkpoint folder is whole or it is not there.

    checkpoints/0000001000/            the training step
        .metadata  __*_*.distcp        model and optimizer, in PyTorch's distributed format
        params.json                    the config
        train_state_00000.json         step and the loader's place, one file a data-parallel rank
        checksums.json                 of the files above (checkpoint_integrity.py)
        consolidated/consolidated.pth  the model alone in one file, made by `consolidate_checkpoints`
    checkpoints/0000002000.damaged/    one that a resume passed over; nothing here reads or removes it

It is written beside its place, flushed to the disk, and renamed into it. No file of it is read by unrestricted pickle.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import logging
import pickle
import pickletools
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lingua import slurm
from lingua.args import first_line
from lingua.checkpoint_integrity import (
    CHECKSUMS_FILE,
    Checksums,
    Spans,
    SummingWriter,
    find_other_bytes,
    find_other_size,
    flush_folder,
    is_summed,
    read_checksums,
    write_checksums,
    write_json,
    writing,
)
from lingua.config import CheckpointArgs
from lingua.config import SaveEvery as SaveEvery
from lingua.data import redistribute_state
from lingua.distributed import broadcast_object, failing_alike, is_of_a_lost_rank, raise_on_all_ranks
from lingua.errors import UserError
from lingua.sharding import is_split, local_part, local_slices, split_like

logger = logging.getLogger(__name__)

CONSOLIDATED_FOLDER = "consolidated"
CONSOLIDATED_FILE = "consolidated.pth"
CONFIG_FILE = "params.json"
TRAIN_STATE_KEYS = ("step", "data_loader_state")

# Of a tensor that are read at once.
READ_BYTES = 2**22

# Seconds, before a save that has failed is tried again.
PAUSES = (1, 3)

_WHOLE = re.compile(r"\d{10}")
_BEING_WRITTEN = re.compile(r"\.\d{10}\.(tmp|old)")


class CheckpointManager:
    """The checkpoints of one run. Its methods are called by all ranks together.

    `saved`: the step of the newest checkpoint that it has written, or that the run has gone on from. `passed_over`: by
    step, what is wrong with those that `latest` found damaged. `seconds`: that the newest one took to be written.

    Args:
        data_rank: the number under which this rank writes its training state, None where another rank writes the same.
        timeout: seconds without an answer from another rank after which saving in the background fails.
        run: the run's dump_dir. Of a `path` outside of it nothing is removed but what this run has written.
        find_awaited: which of these steps somebody still waits to read, so that retention leaves them for now.
    """

    def __init__(
        self,
        args: CheckpointArgs,
        path: Path,
        rank: int = 0,
        data_rank: int | None = 0,
        timeout: int = 600,
        run: Path | None = None,
        find_awaited: Callable[[list[int]], set[int]] = lambda _: set(),
    ):
        self.args, self.find_awaited = args, find_awaited
        self.path, self.run = path, run
        self.rank, self.data_rank = rank, data_rank
        self.timeout = timedelta(seconds=timeout)
        self.saved = 0
        self.seconds: float | None = None
        self.passed_over: dict[int, str] = {}
        self._left: set[int] = set()  # what retention could not remove, and has reported
        self._group: dist.ProcessGroup | None = None
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def is_due(self, step: int) -> bool:
        return self.args.dump.is_due(step) or self.args.eval.is_due(step)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, as the first rank sees the folder: others may see it later. None without any.

        All files are read, by each rank a share. One that is damaged is passed over with a warning. Raises UserError
        where all of them are: a run that started at step 0 would replace them and its metrics.
        """
        with raise_on_all_ranks():
            existing = list_checkpoints(self.path) if self.rank == 0 else []
        existing = broadcast_object(existing)
        self.passed_over = {}
        for folder in reversed(existing):
            problem = broadcast_object((find_damage(folder) or find_damaged_json(folder)) if self.rank == 0 else None)
            problem = problem or find_other_bytes(folder)
            if problem is None:
                if self.rank == 0:
                    for step, why in self.passed_over.items():
                        logger.warning("passing over the checkpoint %s: %s", self._places(step)[0], why)
                return folder
            self.passed_over[int(folder.name)] = problem
        if existing:
            with raise_on_all_ranks():
                raise UserError(
                    f"'{self.path}': no checkpoint is whole (of {len(existing)}); the newest, {existing[-1].name}: "
                    f"{self.passed_over[int(existing[-1].name)]}; restore one to go on from it, or move the folder "
                    "away to start at step 0"
                )
        return None

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, train_state: dict[str, Any], config: dict[str, Any]
    ) -> Path:
        """Writes the checkpoint of `step`, then removes those that retention gives up.

        With `save_async` it returns as soon as everything is copied to the CPU's memory, and `finish` waits for the
        rest. What fails is tried again after each of PAUSES, but not where there is no room. Raises OSError, the same
        on all ranks, where the checkpoint, or the one before it that was still being written, cannot be written;
        nothing half-written stays then, older ones stay as they are, and training can go on.
        """
        self.finish()
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        files = {} if self.data_rank is None else {f"train_state_{self.data_rank:05d}.json": train_state}
        if self.rank == 0:
            files[CONFIG_FILE] = config
        if not self.args.save_async:
            self._write(step, state, files)
            return self._places(step)[0]
        if dist.is_initialized() and self._group is None:
            # Of its own: what ranks tell each other about files must not get between training's collectives.
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        state, files = BlockingAsyncStager().stage(state), copy.deepcopy(files)
        self._pending = self._background.submit(self._write, step, state, files, self._group)
        return self._places(step)[0]

    def finish(self) -> None:
        """Waits until the checkpoint that is being written in the background, if any, is in its place.

        Raises OSError as `save` does.
        """
        if self._pending is not None:
            written, self._pending = self._pending, None
            written.result()

    def _places(self, step: int) -> tuple[Path, Path, Path]:
        """Where the checkpoint of a step lies, is being written, and is being removed."""
        return self.path / f"{step:010d}", self.path / f".{step:010d}.tmp", self.path / f".{step:010d}.old"

    def _write(
        self, step: int, state: dict[str, Any], files: dict[str, dict[str, Any]], group: dist.ProcessGroup | None = None
    ) -> None:
        """All ranks together, through `group`."""
        begun = time.monotonic()
        with self._whole_or_not_at_all(step):
            with failing_alike(group):
                if self.rank == 0:
                    self._check_place(step, state)
            for pause in (*PAUSES, None):
                try:
                    self._write_once(step, state, files, group)
                    break
                except OSError as error:
                    if pause is None:
                        raise
                    if self.rank == 0:
                        logger.warning("checkpoint of step %s: %s; trying again in %s s", step, error, pause)
                    time.sleep(pause)
        self.saved = step
        self.seconds = took = time.monotonic() - begun
        self.passed_over.pop(step, None)
        if self.rank == 0:
            logger.info("saved %s", self._places(step)[0])
            if slurm.in_job() and took > slurm.WARNING_SECONDS / 2:
                logger.warning(
                    "that took %.0f s, and SLURM warns %s s before it ends a job: a last checkpoint may not be whole "
                    "by then; what a job loses is what came after the one before, so save often "
                    "(checkpoint.dump.every)",
                    took,
                    slurm.WARNING_SECONDS,
                )
            try:
                self._retain(newest=step)
            except OSError as error:
                logger.warning("old checkpoints could not be removed: %s", error)

    def _write_once(
        self, step: int, state: dict[str, Any], files: dict[str, dict[str, Any]], group: dist.ProcessGroup | None
    ) -> None:
        beside = self._places(step)[1]
        sums: dict[str, Checksums] = {}
        with failing_alike(group):
            if self.rank == 0:
                _remove(beside)
                beside.mkdir(parents=True)
        # On its own: a rank that fails here must not leave the others in what all of them write together.
        with failing_alike(group):
            for name, value in files.items():
                write_json(beside / name, value, sums)
        with failing_alike(group), _errors_of_writing(beside), _without_warnings():
            writer = SummingWriter(beside, sums)
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
        with failing_alike(group):
            if self.rank == 0:
                self._put_in_place(step)

    @contextlib.contextmanager
    def _whole_or_not_at_all(self, step: int) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            beside = self._places(step)[1]
            if self.rank == 0 and not self._is_foreign(beside):
                with contextlib.suppress(OSError):
                    _remove(beside)
            if isinstance(error, OSError):
                raise OSError(f"checkpoint of step {step} in {self.path} could not be written: {error}") from None
            raise

    def _check_place(self, step: int, state: dict[str, Any]) -> None:
        """Raises OSError where it is taken, or has less room than the tensors take: nothing is begun then."""
        if any(place.exists() and self._is_foreign(place) for place in self._places(step)):
            raise OSError("a checkpoint of this step is there that is not of this run; name another checkpoint.path")
        tensors = [value for value in _flatten(state).values() if isinstance(value, torch.Tensor)]
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise OSError(
                f"No space left on device: {needed / 2**20:,.1f} MiB are needed, and {free / 2**20:,.1f} MiB are free"
            )

    def clean_up(self) -> None:
        """Removes what a killed run left half-written."""
        if self.rank == 0 and self.path.is_dir():
            for entry in self.path.iterdir():
                if _BEING_WRITTEN.fullmatch(entry.name) and not self._is_foreign(entry):
                    with contextlib.suppress(OSError):
                        _remove(entry)

    def set_aside(self) -> None:
        """Renames the damaged checkpoints that `latest` has passed over. Raises OSError where that fails."""
        if self.rank == 0:
            for step in self.passed_over:
                self._set_aside(step)

    def _set_aside(self, step: int) -> None:
        """Training comes by its step again, and somebody may be able to restore it."""
        final = self._places(step)[0]
        if not final.exists() or self._is_foreign(final):
            return
        numbers = itertools.count(2)
        aside = final.with_name(f"{final.name}.damaged")
        while aside.exists():
            aside = final.with_name(f"{final.name}.damaged.{next(numbers)}")
        final.rename(aside)
        logger.warning("kept the damaged checkpoint of step %s as %s", step, aside)

    def _put_in_place(self, step: int) -> None:
        final, beside, old = self._places(step)
        flush_folder(beside)
        if step in self.passed_over:
            self._set_aside(step)
        if final.exists():  # of the init checkpoint's run
            self._move_away(step)
        beside.rename(final)
        flush_folder(self.path)
        with contextlib.suppress(OSError):
            _remove(old)

    def _retain(self, newest: int) -> None:
        """A checkpoint stays while it is among the last `keep` of its kind; one for evaluation may be both kinds.

        One that was passed over as damaged counts for none, and stays. One that somebody waits for goes when a later
        one is saved. One that cannot be removed is no reason to end a run: it stays, with a warning.
        """
        steps = [int(folder.name) for folder in list_checkpoints(self.path) if int(folder.name) <= newest]
        steps = [step for step in steps if step not in self.passed_over]
        evals = [step for step in steps if self.args.eval.is_due(step)]
        dumps = [step for step in steps if self.args.dump.is_due(step) or step not in evals]
        kept = {newest}
        for kind, keep in ((dumps, self.args.dump.keep), (evals, self.args.eval.keep)):
            kept.update(kind if keep <= 0 else kind[-keep:])
        given_up = sorted(set(steps) - kept - self._left)
        awaited = self.find_awaited(given_up) if given_up else set()
        for step in given_up:
            if step in awaited:
                continue
            try:
                self._move_away(step)
                _remove(self._places(step)[2])
            except OSError as error:
                self._left.add(step)
                logger.warning("the old checkpoint of step %s could not be removed: %s", step, error)

    def _move_away(self, step: int) -> None:
        """Renamed before it is removed, so that a kill in the middle leaves nothing that looks like a checkpoint."""
        final, _, old = self._places(step)
        if self._is_foreign(final):
            raise OSError("it lies outside of dump_dir and is not of this run; remove it yourself")
        _remove(old)
        final.rename(old)

    def _is_foreign(self, folder: Path) -> bool:
        """Whether it lies outside of dump_dir and is of another run, going by its config."""
        if self.run is None or folder.parent.resolve().is_relative_to(self.run.resolve()):
            return False
        try:
            return Path(read_json(folder / CONFIG_FILE, ("dump_dir",))["dump_dir"]).resolve() != self.run.resolve()
        except (OSError, ValueError, TypeError):
            return _BEING_WRITTEN.fullmatch(folder.name) is None or (folder / CONFIG_FILE).exists()


def list_checkpoints(path: Path) -> list[Path]:
    """The checkpoint folders in `path`, oldest first."""
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if _WHOLE.fullmatch(entry.name) and entry.is_dir())


def refuse_parent(path: Path) -> None:
    """Raises UserError where `path` is no checkpoint but the folder of several, or the dump_dir above that."""
    if (path / ".metadata").is_file() or find_consolidated(path) is not None:
        return
    for folder in (path, path / "checkpoints"):
        names = [checkpoint.name for checkpoint in list_checkpoints(folder)]
        if names:
            shown = ", ".join(names if len(names) <= 4 else [*names[:2], "...", *names[-2:]])
            raise UserError(
                f"'{path}' is no checkpoint; there are {len(names)} in '{folder}': {shown}; name one of them, such as "
                f"{folder / names[-1]}"
            )


def find_damage(folder: Path) -> str | None:
    """What is wrong with a distributed checkpoint's files, going by their names and sizes; None for a whole one."""
    if not folder.is_dir():
        return "no checkpoint is there"
    if not (folder / ".metadata").is_file():
        return "it has no .metadata"
    try:
        sums = read_checksums(folder)
        if sums is not None:
            # With the table of contents' own bytes, before anything is concluded from it.
            problem = find_other_size(folder, sums) or find_other_bytes(folder, {".metadata": None}, alone=True)
            if problem is not None:
                return problem
        metadata = read_metadata(folder)
        if sums is None and is_summed(metadata):
            return f"the file {CHECKSUMS_FILE} is missing"
        storage = metadata.storage_data
        if not storage:
            return "its .metadata names no files"
        sizes: dict[str, int] = {}
        for stored in storage.values():
            sizes[stored.relative_path] = max(sizes.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                return f"the file {name} is missing"
            if file.stat().st_size < size:
                return f"the file {name} has {file.stat().st_size} bytes of {size}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def find_damaged_json(folder: Path) -> str | None:
    """What is wrong with the config and the training states beside a distributed checkpoint; None if nothing is."""
    files = [folder / CONFIG_FILE, *sorted(folder.glob("train_state_*.json"))]
    if len(files) == 1:
        return "it has no train_state_*.json"
    for file in files:
        try:
            read_json(file, () if file.name == CONFIG_FILE else TRAIN_STATE_KEYS)
        except (OSError, ValueError) as error:
            return str(error)
    return None


# --- loading -------------------------------------------------------------------------------------------------------


def refuse_damaged(path: Path) -> None:
    """Compares what `load_model` would read of `path` with its checksums, and the config too.

    All ranks call it together. Raises UserError that names the first file which is missing, cut short, or holds other
    bytes than were written. A checkpoint without checksums passes where its files have the right names and sizes.
    """
    with raise_on_all_ranks():
        found = find_consolidated(path)
    file = broadcast_object(found)
    if file is None:
        refuse_damaged_distributed(path, weights_only=True)
        return
    names = (file.name, CONFIG_FILE)
    with raise_on_all_ranks():
        sums = read_checksums(file.parent) or {}
        problem = find_other_size(file.parent, {name: sums[name] for name in names if name in sums})
        _refuse(file.parent, problem)
    _refuse_together(file.parent, find_other_bytes(file.parent, dict.fromkeys(names)))
    if path.is_dir() and path != file.parent:
        _refuse_together(path, find_other_bytes(path, {CONFIG_FILE: None}))


def refuse_damaged_distributed(folder: Path, weights_only: bool = False) -> None:
    """As `refuse_damaged`, with the optimizer's state and the places in the data, unless `weights_only`."""
    with raise_on_all_ranks():
        _refuse(folder, find_damage(folder))
        wanted = _spans_of_weights(folder) if weights_only else None
    _refuse_together(folder, find_other_bytes(folder, wanted))


def _refuse(folder: Path, problem: str | None) -> None:
    if problem is not None:
        raise UserError(f"{folder}: not a whole checkpoint; {problem}")


def _refuse_together(folder: Path, problem: str | None) -> None:
    """Of what all ranks have found alike."""
    if problem is not None:
        with raise_on_all_ranks():
            _refuse(folder, problem)


def _spans_of_weights(folder: Path) -> dict[str, Spans]:
    """What to read of each file of a distributed checkpoint for the model alone."""
    places = read_metadata(folder).storage_data
    spans: dict[str, Spans] = dict.fromkeys(file.name for file in folder.iterdir() if file.is_file())
    spans |= {stored.relative_path: [] for stored in places.values()}
    for index, stored in places.items():
        if index.fqn.startswith("model."):
            spans[stored.relative_path].append((stored.offset, stored.offset + stored.length))
    return spans


def load_training(folder: Path, model: nn.Module, optimizer: Optimizer, compared: bool = False) -> None:
    """Takes model and optimizer state from a distributed checkpoint, in place. All ranks call it together.

    The options of the optimizer's groups (learning rates, weight decay, ...) stay those of the config.
    Raises UserError for a damaged checkpoint or one of another shape, naming key and shapes; on one rank where it is
    wrong for that one alone, and the others leave (`together`).

    Args:
        compared: whether it was compared with its checksums a moment ago.
    """
    if not compared:
        refuse_damaged_distributed(folder)
    model_state = get_model_state_dict(model)
    optimizer_state = get_optimizer_state_dict(model, optimizer)
    _read_distributed(folder, {"model": model_state, "optim": {"state": optimizer_state["state"]}}, model)
    set_model_state_dict(model, model_state)
    set_optimizer_state_dict(model, optimizer, optimizer_state)


def load_model(path: Path, model: nn.Module, compared: bool = False) -> None:
    """Takes the weights alone from a distributed checkpoint, or a consolidated one (file, folder, or the folder above).

    All ranks call it together. Raises UserError as `load_training`, and where there is no checkpoint.
    """
    with raise_on_all_ranks():
        found = find_consolidated(path)
        if found is None and not (path / ".metadata").is_file():
            refuse_parent(path)
            raise UserError(f"no checkpoint in '{path}': neither .metadata nor {CONSOLIDATED_FILE} is there")
    if not compared:
        refuse_damaged(path)
    file = broadcast_object(found)
    if file is None:
        state = get_model_state_dict(model)
        _read_distributed(path, {"model": state}, model)
        set_model_state_dict(model, state)
        return
    with raise_on_all_ranks():
        try:
            model.load_state_dict(_split_like(model, read_consolidated(file)))
        except RuntimeError as error:
            raise UserError(f"{file}: {_first_mismatch(error)}") from None


def _split_like(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each tensor what this rank holds of the parameter, where that is split over ranks."""
    if hasattr(model, "canonicalize"):
        model.canonicalize(state)
    parameters, split = dict(model.named_parameters()), {}
    for name, tensor in state.items():
        own = parameters.get(name)
        split[name] = tensor
        if own is not None and is_split(own) and own.shape == tensor.shape:
            split[name] = split_like(tensor[local_slices(own)].to(local_part(own).device), own)
    return split


def read_train_state(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """One data-parallel rank's step and place in the data, whatever the number of ranks that wrote them.

    Raises UserError where files are missing, or do not go together.
    """
    files = sorted(folder.glob("train_state_*.json"))
    if not files:
        raise UserError(f"no checkpoint of a training run in '{folder}': no train_state_*.json is there")
    for number, file in enumerate(files):
        if file.name != f"train_state_{number:05d}.json":
            raise UserError(
                f"{folder}: train_state_{number:05d}.json is missing, though {file.name} is there; put it back, or "
                "resume from another checkpoint"
            )
    if len(files) == world_size:
        return read_json(files[rank], TRAIN_STATE_KEYS)
    train_states = [read_json(file, TRAIN_STATE_KEYS) for file in files]
    steps = [train_state["step"] for train_state in train_states]
    for number, step in enumerate(steps):
        if step != steps[0]:
            raise UserError(
                f"{folder}: {files[0].name} is of step {steps[0]} and {files[number].name} of step {step}; resume from "
                "another checkpoint"
            )
    try:
        place = redistribute_state([train_state["data_loader_state"] for train_state in train_states], rank, world_size)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    return {**train_states[0], "data_loader_state": place}


def read_json(file: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object that has `keys`; raises UserError for anything else."""
    try:
        loaded = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    for key in keys:
        if not isinstance(loaded, dict) or key not in loaded:
            raise UserError(f'{file}: has no "{key}"; it was not written by this code, or is damaged')
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: a JSON {type(loaded).__name__} where an object is wanted")
    return loaded


def find_consolidated(path: Path) -> Path | None:
    """The consolidated file at `path` (the file, its folder, or the checkpoint folder above it), if there is one."""
    for candidate in (path, path / CONSOLIDATED_FILE, path / CONSOLIDATED_FOLDER / CONSOLIDATED_FILE):
        if candidate.is_file():
            return candidate
    return None


def read_consolidated(file: Path) -> dict[str, torch.Tensor]:
    """The model's state dict. Raises UserError for what is no such file; runs no code from it."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not a consolidated checkpoint ({first_line(error)})") from None
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f'{file}: not a consolidated checkpoint; wanted {{"model": names to tensors}}')
    return dict(state)


def consolidate_checkpoints(ckpt_dir: str | Path) -> Path:
    """Gathers the model of a distributed checkpoint into `ckpt_dir/consolidated`, once; returns that folder.

    Where there are several ranks, one of them calls it, in whose memory the whole model must fit. Raises UserError for
    what is no whole distributed checkpoint.
    """
    source, folder = Path(ckpt_dir), Path(ckpt_dir) / CONSOLIDATED_FOLDER
    if (folder / CONSOLIDATED_FILE).is_file():
        return folder
    _refuse(source, find_damage(source))
    _refuse(source, find_other_bytes(source, _spans_of_weights(source), alone=True))
    config = read_json(source / CONFIG_FILE)
    stored = _stored_tensors(read_metadata(source))
    state = {
        key.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith("model.")
    }
    _fill(source, {"model": state}, alone=True)
    beside = source / f".{CONSOLIDATED_FOLDER}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write_consolidated(beside, state, config)
        flush_folder(beside)
        beside.rename(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{folder} could not be written: {first_line(error)}") from None
    return folder


def write_consolidated(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """A model's state dict and config as a consolidated checkpoint, into a folder that is there."""
    sums: dict[str, Checksums] = {}
    with writing(folder / CONSOLIDATED_FILE, sums) as stream:
        torch.save({"model": state}, stream)
    write_json(folder / CONFIG_FILE, config, sums)
    write_checksums(folder, sums)


def _read_distributed(folder: Path, state: dict[str, Any], model: nn.Module) -> None:
    """Fills the tensors of `state` from the folder, which must not hold parameters that the model lacks."""
    wanted = _flatten(state)
    # All that a rank can find wrong by itself comes before what ranks do for each other.
    with raise_on_all_ranks():
        found = _stored_tensors(read_metadata(folder))
        for key, tensor in wanted.items():
            if key in found and tensor.shape != found[key].size:
                raise UserError(
                    f"{folder}: {key} has shape {list(found[key].size)}, this model's has {list(tensor.shape)}"
                )
        missing = sorted(wanted.keys() - found.keys())
        if missing:
            is_optimizer = all(key.startswith("optim.") for key in missing)
            other = "a run with another optim.name" if is_optimizer else "a model with other `model` settings"
            raise UserError(f"{folder}: the checkpoint lacks {_some(missing)}; is it of {other}?")
        repeated = _refuse_surplus(folder, found, wanted, model)
    # A published checkpoint repeats the shared table: the other names must hold the same numbers, which the model
    # finds out where it is given them beside what has their shape. Each rank compares the part that it holds.
    for name in repeated:
        alike = [key for key in wanted if key.startswith("model.") and wanted[key].shape == found[name].size]
        tensors = {
            key: torch.empty_like(wanted[alike[0]].detach(), dtype=found[key].properties.dtype)
            for key in (name, *alike)
        }
        with raise_on_all_ranks():
            _fill(folder, tensors)
        with raise_on_all_ranks():
            model.canonicalize({key.removeprefix("model."): local_part(tensor) for key, tensor in tensors.items()})
    with raise_on_all_ranks():
        _fill(folder, state)


def _fill(folder: Path, state: dict[str, Any], alone: bool = False) -> None:
    """`alone`: on this rank, whatever the others do."""
    no_dist = alone or not dist.is_initialized()
    try:
        with _without_warnings():
            dcp.load(state, storage_reader=_Reader(folder), planner=_TensorsOnly(), no_dist=no_dist)
    except (Exception, CheckpointException) as error:
        if is_of_a_lost_rank(error):
            raise
        raise UserError(f"{folder}: cannot be read; its files are damaged ({_root_cause(error)[:200]})") from None


def _refuse_surplus(
    folder: Path, found: dict[str, TensorStorageMetadata], wanted: dict[str, torch.Tensor], model: nn.Module
) -> list[str]:
    """Raises UserError for parameters in the folder that the model neither has nor knows as another's other name.

    Returns the keys that it knows as such.
    """
    stored = {key.removeprefix("model."): entry for key, entry in found.items() if key.startswith("model.")}
    kept = {key: torch.empty(entry.size, device="meta") for key, entry in stored.items()}
    if hasattr(model, "canonicalize"):
        model.canonicalize(kept)
    surplus = sorted(key for key in kept if f"model.{key}" not in wanted)
    if surplus:
        raise UserError(
            f"{folder}: the checkpoint has {_some(surplus)}, which this model lacks; check the `model` settings"
        )
    return [f"model.{name}" for name in sorted(stored.keys() - kept.keys())]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _stored_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata.items()
    return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _flatten(state: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    flat = {}
    for key, value in state.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- reading without running code ------------------------------------------------------------------------------------

# All that the .metadata of a distributed checkpoint is made of.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return super().find_class(module, name)


def _refuse_far_memo_places(content: bytes) -> None:
    """A pickle may name the place in the memo where an object is kept, and the unpickler makes that many places: one
    flipped bit in such a number asks for 30 GB, which are written before anything is found to be wrong."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument >= len(content):
            raise pickle.UnpicklingError(f"place {argument} of the memo")


def read_metadata(folder: Path) -> Metadata:
    """The table of contents of a distributed checkpoint. Raises UserError for anything else, without running it."""
    file = folder / ".metadata"
    try:
        content = file.read_bytes()
        _refuse_far_memo_places(content)
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{file} is damaged ({first_line(error)})") from None
    try:
        sound = isinstance(metadata, Metadata) and all(
            isinstance(stored.relative_path, str) and stored.offset >= 0 and stored.length >= 0
            for stored in metadata.storage_data.values()
        )
    except (AttributeError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{file} is damaged (it is no table of contents)")
    return metadata


class _Reader(FileSystemReader):
    """Reads a large tensor in parts: none is held twice, so a run that fits the memory can be resumed in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        small = []
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            is_large = item.type is LoadItemType.TENSOR and stored.length > READ_BYTES
            if not (is_large and self._read_in_parts(item, stored, planner)):
                small.append(item)
        return super().read_data(dataclasses.replace(plan, items=small), planner)

    def _read_in_parts(self, item: ReadItem, stored: Any, planner: LoadPlanner) -> bool:
        """Of its rows, as many at once as READ_BYTES hold. False, with nothing done, for a tensor of another layout."""
        if getattr(stored, "transform_descriptors", None):
            return False
        with open(Path(self.path) / stored.relative_path, "rb") as file:
            # Its type, shape and place in the file.
            layout = torch.load(self._slice_file(file, stored), map_location="meta", weights_only=True)
            place = getattr(layout.untyped_storage(), "_checkpoint_offset", None)
            if place is None or layout.dim() == 0 or not layout.is_contiguous():
                return False
            row_bytes = layout[0].numel() * layout.element_size()
            begin = stored.offset + place + layout.storage_offset() * layout.element_size()
            begin += item.storage_offsets[0] * row_bytes
            n_rows, at_once = item.lengths[0], max(READ_BYTES // row_bytes, 1)
            columns = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets[1:], item.lengths[1:], strict=True))
            target = planner.resolve_tensor(item).detach()
            buffer = torch.empty((min(at_once, n_rows), *layout.shape[1:]), dtype=layout.dtype)
            content = memoryview(buffer.flatten().view(torch.uint8).numpy())
            for first in range(0, n_rows, at_once):
                n = min(at_once, n_rows - first)
                file.seek(begin + first * row_bytes)
                if file.readinto(content[: n * row_bytes]) < n * row_bytes:
                    raise UserError(f"{stored.relative_path} is cut short")
                target[first : first + n].copy_(buffer[(slice(n), *columns)])
            planner.commit_tensor(item, target)
        return True


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise UserError(f"{read_item.storage_index.fqn}: holds a pickle where a tensor belongs")


# --- small things ----------------------------------------------------------------------------------------------------


def _remove(folder: Path) -> None:
    """With all in it, where it is there; of a link, the link alone."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def _errors_of_writing(folder: Path) -> Iterator[None]:
    """Turns what torch raises when it cannot write into an OSError."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        if is_of_a_lost_rank(error):
            raise
        # Some of torch's errors on a full disk do not say that it is full.
        full = folder.exists() and shutil.disk_usage(folder).free < 2**20
        raise OSError("No space left on device: " * full + _root_cause(error)) from None


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """For calls that warn of saving and loading without a process group, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _first_mismatch(error: RuntimeError) -> str:
    """The first line that tells a key out of what `load_state_dict` raises."""
    details = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return (details[0] if len(details[0]) <= 400 else details[0][:400] + " ...") + more


def _root_cause(error: BaseException) -> str:
    """The message of what went wrong, out of the exception that tells of all ranks."""
    for cause in getattr(error, "failures", {}).values():
        return first_line(cause[0] if isinstance(cause, tuple) else cause)
    return first_line(error)

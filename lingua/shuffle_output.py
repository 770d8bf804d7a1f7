"""Where a shuffle's output goes: the lock, the room, the manifest, and chunks in their places all at once or not yet.

Chunk files of two runs must never lie together, since a loader would read both. So a folder with chunk files that no
manifest tells of is refused, local chunks wait in the work folder until all are whole, and a manifest, written last,
says what was made of what.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from lingua.args import check_writable
from lingua.documents import InputFile, estimate_expansion, filesystem, is_remote, join
from lingua.errors import UserError
from lingua.shuffle import FORMAT, Plan, Totals, uploading, write_whole, writing
from lingua.sources import TRAIN_FILES, VALIDATION_FILES


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a folder, which it makes; who is killed lets go of it. Raises UserError where another one holds it.

    The folder goes when there is nothing in it at the end, with those around it that were made for it.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "lock"
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the folder, and this file with it, on its way out.
            if not file.exists() or os.fstat(handle).st_ino != file.stat().st_ino:
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(f"{folder}: another process works here; wait for it, or end it") from None
        except OSError:
            pass  # a network filesystem without locks
        try:
            yield
        finally:
            if folder.is_dir() and [entry.name for entry in folder.iterdir()] == ["lock"]:
                file.unlink()
                for parent in {folder: None} | dict.fromkeys(made):
                    with contextlib.suppress(OSError):
                        parent.rmdir()
    finally:
        os.close(handle)


def manifest_path(out: str, name: str) -> str:
    return join(out, f"{name}.manifest.json")


def _read(path: str) -> bytes | None:
    try:
        if not is_remote(path):
            return Path(path).read_bytes()
        system, inner = filesystem(path)
        return system.cat_file(inner)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _sizes(folder: str) -> dict[str, int]:
    """Of all files of a folder that a loader would take for chunks or validation."""
    if is_remote(folder):
        system, inner = filesystem(folder)
        try:
            listed = {os.path.basename(entry["name"]): entry["size"] for entry in system.ls(inner, detail=True)}
        except FileNotFoundError:
            listed = {}
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed: {error}") from None
    else:
        listed = {path.name: path.stat().st_size for path in Path(folder).glob("*") if path.is_file()}
    return {
        name: size
        for name, size in sorted(listed.items())
        if not name.startswith(".") and any(fnmatch(name, pattern) for pattern in (TRAIN_FILES, VALIDATION_FILES))
    }


def find_result(out: str, name: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of what lies in `out`, if it is whole and was made with `wanted`; None where there is none.

    Raises UserError where it was made with something else, or its files are not as they were written.
    """
    content = _read(manifest_path(out, name))
    if content is None:
        return None
    try:
        manifest = {"columns": None, "skipped": 0, **json.loads(content)}
        files = {file: facts["bytes"] for file, facts in manifest["files"].items()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{manifest_path(out, name)}: not a manifest; remove the folder to make it anew") from None
    for key, value in {"format": FORMAT, **wanted}.items():
        if manifest.get(key) != value:
            then, now = map(_brief, (manifest.get(key), value))
            raise UserError(
                f"{out}: made with {key} {then}, wanted {now}; remove the folder to make it anew, or name another one"
            )
    found = _sizes(out)
    wrong = [file for file in {**files, **found} if files.get(file) != found.get(file)]
    if wrong:
        sizes = (f"{found[wrong[0]]} bytes" if wrong[0] in found else "missing", files.get(wrong[0], "no such file"))
        raise UserError(
            f"{join(out, wrong[0])}: {sizes[0]}, but the manifest tells of {sizes[1]}; remove the folder to make it "
            "anew"
        )
    return manifest


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else f"{len(value)} others"


def check_no_strangers(plan: Plan) -> None:
    """Raises UserError where there are chunk files that a loader would take for ours."""
    found = _sizes(plan.out)
    if found:
        raise UserError(
            f"{plan.out}: holds {len(found)} chunk or validation files ({next(iter(found))}) of something else, or of "
            "a run that was given up; remove them"
        )


def text_bytes(files: tuple[InputFile, ...], columns: tuple[str, ...] | None = None) -> float:
    """Estimated bytes of JSON lines that the files hold, with `columns` alone where given."""
    expansion = estimate_expansion(list(files), columns)
    return sum(file.size * expansion[file.suffix] for file in files if file.size)


def check_disk(*writes: tuple[str, float]) -> None:
    """`writes`: folders and the bytes that each will get. Raises UserError where a disk has less than that free."""
    needed: dict[int, tuple[str, float]] = {}
    for folder, size in writes:
        existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
        device = existing.stat().st_dev
        needed[device] = (folder, needed.get(device, ("", 0.0))[1] + size)
    for folder, size in needed.values():
        check_writable("disk", Path(folder), int(size))


def check_space(plan: Plan, expected: float) -> None:
    """Raises UserError where the disk has no room for what is not written yet; `expected`: bytes of all documents."""
    if is_publishing(plan):
        return
    writes = [(plan.work, expected - _bytes_in(plan.units_folder))]
    if plan.is_published_at_once:
        writes.append((plan.out, expected - _bytes_in(plan.chunks_folder)))
    check_disk(*((folder, max(size, 0.0)) for folder, size in writes))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


def is_publishing(plan: Plan) -> bool:
    """Whether chunks may be in their places already."""
    return Path(plan.stage, "publishing").exists()


def begin(plan: Plan, say: Callable[[str], None]) -> None:
    """Makes the work folder, or takes up the one that there is."""
    earlier = Plan.load(plan.work)
    if earlier != plan:
        check_no_strangers(plan)
        if earlier is not None:
            changed = [key for key, value in plan.facts().items() if getattr(earlier, key) != value]
            say(f"starting anew: {' and '.join(changed)} changed since the run that was stopped")
        remove_work(plan.work, plan.stage)
    elif not is_publishing(plan) and plan.is_published_at_once:
        check_no_strangers(plan)
    for folder in (plan.units_folder, plan.chunks_folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    if earlier != plan:
        plan.save()


def remove_work(work: str, stage: str) -> None:
    """What was made in the folders, but for the lock; and the folders, where nothing else is in them."""
    for folder in (Path(work), Path(stage)):
        # The plan goes first: without it nothing that is left here counts.
        for name in ("plan.json", "cuts.json", "publishing"):
            (folder / name).unlink(missing_ok=True)
        for made in (*folder.glob("units*"), *folder.glob("chunks*"), folder / "jobs"):
            shutil.rmtree(made, ignore_errors=True)
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def clear_leftovers(work: str, stage: str) -> None:
    """Of a run that was killed when all was done."""
    if Path(stage).is_dir():
        with contextlib.suppress(ValueError), lock(Path(stage)):
            remove_work(work, stage)


def remove_parts(plan: Plan) -> None:
    """What killed workers left. Whoever still writes one finds it gone at the end, and fails."""
    for folder in (plan.units_folder, plan.chunks_folder, Path(plan.work), Path(plan.stage)):
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)


def check_unchanged(files: tuple[InputFile, ...], say: Callable[[str], None]) -> None:
    """Raises UserError where a local file has another size than when it was listed; says so of another time only."""
    for file in files:
        if not is_remote(file.path):
            try:
                status = os.stat(file.path)
            except OSError as error:
                raise UserError(f"{file.path}: {error.strerror}") from None
            if status.st_size != file.size:
                raise UserError(f"{file.path}: changed while it was read; start again when it is whole")
            if str(status.st_mtime_ns) != file.stamp:
                say(f"{file.path}: its time has changed while it was read, but not its size; taken as the same")


def publish(plan: Plan, source: dict[str, Any], totals: Totals) -> dict[str, Any]:
    """Puts chunks and validation in their places, checks that all is there, writes the manifest, removes the work.

    Raises UserError where what went in is not what came out.
    """
    counts = [json.loads(plan.staged(chunk, "json").read_bytes()) for chunk in range(plan.nchunks)]
    files: dict[str, dict[str, int]] = {}
    if plan.is_published_at_once:
        write_whole(Path(plan.stage, "publishing"), b"")
    for chunk, count in enumerate(counts):
        name = plan.chunk_name(chunk)
        files[name] = dict(zip(("documents", "bytes"), count["training"], strict=True))
        staged = plan.staged(chunk, "jsonl")
        if staged.exists():
            os.replace(staged, Path(plan.out, name))
    n_validation, validation_bytes = (sum(count["validation"][column] for count in counts) for column in (0, 1))
    if n_validation:
        name = plan.validation_name
        files[name] = {"documents": n_validation, "bytes": validation_bytes}
        merged = plan.chunks_folder / "validation"
        target = writing(merged) if plan.is_published_at_once else uploading(join(plan.out, name))
        if not (plan.is_published_at_once and Path(plan.out, name).exists()):
            with target as stream:
                for chunk in range(plan.nchunks):
                    with open(plan.staged(chunk, "val"), "rb") as part:
                        shutil.copyfileobj(part, stream)
            if plan.is_published_at_once:
                os.replace(merged, Path(plan.out, name))
    found = _sizes(plan.out)
    out = Totals(sum(facts["documents"] for facts in files.values()), sum(found.values()))
    if out[:2] != totals[:2] or found != {file: facts["bytes"] for file, facts in files.items()}:
        raise UserError(
            f"{plan.out}: {totals.documents} documents and {totals.bytes} bytes went in, {out.documents} and "
            f"{out.bytes} came out; remove it and start again"
        )
    # The runs go first, and then all is there that a kill between here and the end needs to end the same way.
    shutil.rmtree(plan.units_folder, ignore_errors=True)
    manifest = {
        "format": FORMAT,
        "name": plan.name,
        "seed": plan.seed,
        "nchunks": plan.nchunks,
        "n_validation": plan.n_validation,
        "source": source,
        "inputs": [[file.name, file.size] for file in plan.files],
        "columns": plan.columns,
        "skipped": totals.skipped,
        "documents": totals.documents,
        "bytes": totals.bytes,
        "files": files,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    content = json.dumps(manifest, indent=1).encode() + b"\n"  # names of files may be no UTF-8
    path = manifest_path(plan.out, plan.name)
    if plan.is_published_at_once:
        write_whole(Path(path), content)
    else:
        with uploading(path) as stream:
            stream.write(content)
    remove_work(plan.work, plan.stage)
    return manifest

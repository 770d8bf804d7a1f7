"""Downloads a dataset of the Hugging Face hub, or takes local files, and shuffles it to chunk files to train on.

    python setup/download_prepare_hf_data.py fineweb_edu_10bt 8                        # MEMORY: 8 GB, of all processes
    python setup/download_prepare_hf_data.py fineweb_edu 64 --data_dir ./data --seed 42 --nchunks 32
    python setup/download_prepare_hf_data.py wiki 8 --repo org/name --pattern 'data/*.parquet'
    python setup/download_prepare_hf_data.py mine 8 --files folder 'more/*.jsonl.gz' s3://bucket/part
    python setup/download_prepare_hf_data.py fineweb_edu 16 --slurm_partition cpu --slurm_tasks 64   # 16 GB a job

The raw files go to DATA_DIR/NAME, the result to DATA_DIR/NAME_shuffled: NAME.chunk.00.jsonl and so on, NAME.val.jsonl,
and a manifest of what it was made of. Stopped at any moment and started again it goes on; what is done is not done
again. The same seed gives the same files, with whatever memory, workers or machines.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lingua.args import first_line, without_credentials
from lingua.documents import (
    METADATA,
    SUFFIXES,
    TEXT_COLUMNS,
    USUAL_EXPANSION,
    InputFile,
    find_files,
    is_remote,
    join,
    local_form,
    suffix_of,
)
from lingua.errors import UserError
from lingua.shuffle import Plan, write_whole
from lingua.shuffle_jobs import Cluster, Resources, check_memory, of_documents, run
from lingua.shuffle_output import check_disk, clear_leftovers, find_result
from lingua.sources import ON_ERROR

PROGRAM = "download_prepare_hf_data"
DOWNLOAD_WORKERS = 8


@dataclass(frozen=True)
class Dataset:
    """`patterns`: of the files' paths in the repository, as fnmatch takes them."""

    repo: str
    patterns: tuple[str, ...]

    @property
    def ignored(self) -> list[str]:
        """Patterns of what is in no dataset a document, unless it is asked for by name, and of hidden files."""
        named = {pattern.rpartition("/")[2] for pattern in self.patterns}
        names = [*(name for name in METADATA if name not in named), ".*"]
        return [f"{folder}{name}" for name in names for folder in ("", "*/")]


CATALOGUE = {
    "fineweb_edu": Dataset("HuggingFaceFW/fineweb-edu", ("data/*.parquet",)),
    "fineweb_edu_10bt": Dataset("HuggingFaceFW/fineweb-edu", ("sample/10BT/*.parquet",)),
    "dclm_baseline_1.0": Dataset("mlfoundations/dclm-baseline-1.0", ("*.jsonl.zst",)),
    "dclm_baseline_1.0_10prct": Dataset("mlfoundations/dclm-baseline-1.0", ("global-shard_01_of_10/*.jsonl.zst",)),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help tells more)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError for what does not fit together."""
    known = ", ".join(CATALOGUE)
    parser = Parser(prog=f"{PROGRAM}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {known}; or any other one with --repo or --files")
    parser.add_argument("memory", type=float, help="GB for all processes of this machine, or of a SLURM job, together")
    parser.add_argument("--data_dir", default="data", help="folder or URL (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle (default: %(default)s)")
    parser.add_argument("--nchunks", type=int, default=32, help="training files to write (default: %(default)s)")
    parser.add_argument("--n_validation", type=int, help="documents (default: one in a hundred, up to 10,000)")
    parser.add_argument("--repo", help="a dataset of the Hugging Face hub")
    parser.add_argument(
        "--pattern", nargs="+", help="files of --repo, such as 'data/*.parquet' (default: all known kinds)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main)")
    parser.add_argument("--files", nargs="+", help=f"folders, globs, paths or URLs; {', '.join(SUFFIXES)}")
    parser.add_argument(
        "--on_error",
        choices=ON_ERROR,
        default="stop",
        help="at what is no document: stop, or skip it and count it (default: %(default)s)",
    )
    parser.add_argument("--columns", nargs="+", help="what is kept of each document, such as: text url (default: all)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core, as far as MEMORY allows)")
    parser.add_argument("--scratch", help="local folder for what lies between the passes, as large as the text")
    slurm = parser.add_argument_group("on a SLURM cluster, where DATA_DIR and --scratch are seen by all nodes")
    slurm.add_argument("--slurm_partition")
    slurm.add_argument("--slurm_account")
    slurm.add_argument("--slurm_qos")
    slurm.add_argument("--slurm_time", type=int, help="minutes a job (default: the partition's maximum)")
    slurm.add_argument("--slurm_tasks", type=int, help="jobs at once, each with MEMORY (default: 8)")
    slurm.add_argument("--slurm_cpus", type=int, default=1, help="workers of a job (default: %(default)s)")
    slurm.add_argument("--cluster", choices=["slurm", "local"], help="local: try the jobs as processes of this machine")
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"\w[\w.+-]*", args.name):
        raise UserError(f"name '{args.name}': only letters, digits and _ . + - can be in it, it names files")
    if not (args.memory > 0 and math.isfinite(args.memory)):
        raise UserError(f"MEMORY {args.memory:g}: GB, more than 0")
    for option, least in (("nchunks", 1), ("n_validation", 0), ("workers", 1), ("slurm_time", 1), ("slurm_tasks", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"--{option} {value}: {least} or more")
    if args.slurm_cpus < 1:
        raise UserError(f"--slurm_cpus {args.slurm_cpus}: 1 or more")
    given = [args.name in CATALOGUE, args.repo is not None, args.files is not None]
    if not any(given):
        raise UserError(f"unknown dataset '{args.name}'; known: {known}; any other one by --repo or --files")
    if sum(given) > 1:
        raise UserError(f"'{args.name}': one of a known name, --repo and --files, not several")
    if args.pattern and not args.repo:
        raise UserError("--pattern is for files of --repo")
    if args.columns and not set(args.columns) & set(TEXT_COLUMNS):
        raise UserError(f"--columns {' '.join(args.columns)}: {' or '.join(TEXT_COLUMNS)} has to be among them")
    if args.revision and args.files:
        raise UserError("--revision is for datasets of the hub")
    return args


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    args = parse()
    cluster = choose_cluster(args)
    memory = int(args.memory * 1e9)
    if cluster is None:
        check_memory(memory)
    data_dir = local_form(args.data_dir)
    data_dir = data_dir.rstrip("/") if is_remote(data_dir) else os.path.abspath(os.path.expanduser(data_dir))
    out = join(data_dir, f"{args.name}_shuffled")
    scratch = os.path.expanduser(args.scratch or "")
    here = Path(scratch or data_dir) if scratch or not is_remote(data_dir) else temporary_folder(out)
    # Another DATA_DIR with the same scratch folder has its own work there.
    own = f".{args.name}_shuffled.{digest_of(out)[:8]}.work"
    work = here.absolute() / own if scratch or is_remote(out) else Path(out, ".work")
    stage = str(work if is_remote(out) else Path(out, ".work"))
    columns = None if args.columns is None else tuple(dict.fromkeys(args.columns))
    if args.files:
        files = find_files(args.files, exclude=out)
        source = {"files": args.files}
    else:
        dataset = CATALOGUE.get(args.name) or Dataset(args.repo, tuple(args.pattern or (f"*{end}" for end in SUFFIXES)))
        source = {"repo": dataset.repo, "patterns": list(dataset.patterns), "revision": args.revision or "main"}
        # The raw files need not be there any more.
        wanted = {"seed": args.seed, "nchunks": args.nchunks, "n_validation": args.n_validation, "source": source}
        wanted |= of_documents(args.on_error, columns)
        if manifest := find_result(out, args.name, wanted):
            clear_leftovers(str(work), stage)
            print(f"{out}: nothing to do, it is there: {manifest['documents']:,} documents in {args.nchunks} chunks")
            return
        raw = (here if is_remote(data_dir) else Path(data_dir)) / args.name
        files = download(dataset, source, raw, None if is_remote(out) else out, work)
    plan = Plan(
        name=args.name,
        out=out,
        work=str(work),
        stage=stage,
        files=tuple(files),
        seed=args.seed,
        nchunks=args.nchunks,
        n_validation=args.n_validation,
        on_error=args.on_error,
        columns=columns,
    )
    resources = Resources(memory, cluster.cpus if cluster else args.workers)
    print(f"{args.name}: {len(files)} files, {sum(file.size for file in files) / 1e6:,.1f} MB", flush=True)
    manifest = run(plan, resources, source, cluster, say=lambda line: print(line, flush=True))
    written = manifest["files"]
    n_validation = written.get(plan.validation_name, {"documents": 0})["documents"]
    print(
        f"{args.name}: {manifest['documents']:,} documents ({manifest['bytes'] / 1e6:,.1f} MB) in, as many out: "
        f"{manifest['documents'] - n_validation:,} in {args.nchunks} chunks, {n_validation:,} for validation; "
        f"{manifest['skipped']:,} skipped; {out}"
    )
    if is_remote(data_dir):
        kept = "" if args.files else f"; the downloaded files are still in {raw}"
        print(f"{args.name}: training reads folders of the machine that it runs on: copy {out} there{kept}")
        return
    sources = shlex.quote(f"data.sources={{{args.name}_shuffled: 1}}")
    print(
        f"{args.name}: train with {shlex.quote(f'data.root_dir={data_dir}')} {sources}, and data.sources.OTHER=0 for "
        "each other source that the config names"
    )


def choose_cluster(args: argparse.Namespace) -> Cluster | None:
    if not (args.slurm_partition or args.slurm_tasks or args.cluster):
        return None
    return Cluster(
        kind=args.cluster or "slurm",
        tasks=args.slurm_tasks or 8,
        cpus=args.slurm_cpus,
        partition=args.slurm_partition,
        account=args.slurm_account,
        qos=args.slurm_qos,
        minutes=args.slurm_time,
    )


def temporary_folder(out: str) -> Path:
    """The same one each time, so that a run that was stopped goes on."""
    return Path(tempfile.gettempdir(), f"{PROGRAM}-{os.getuid()}-{digest_of(out)}")


def digest_of(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


# --- the hub -----------------------------------------------------------------------------------------------------


def download(dataset: Dataset, source: dict[str, object], raw: Path, out: str | None, work: Path) -> list[InputFile]:
    """The dataset's files in `raw`. Those that are there whole are not asked for again, and when all are, nobody is.

    `out`, `work`: where the shuffled text and what lies between the passes will need room; `out` may need none here.
    Raises UserError, one line, where the hub refuses, cannot be reached, or has no such files.
    """
    marker = raw / ".download.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(marker.read_bytes())
        if known["source"] == source and not missing_files(raw, known["files"]):
            return listed(raw, known["files"])
    from huggingface_hub import snapshot_download

    with explained(dataset.repo, raw):
        commit, sizes = list_repository(dataset, str(source["revision"]))
        text = sum(size * USUAL_EXPANSION[suffix_of(path)] for path, size in sizes.items())
        left = missing_files(raw, sizes)
        check_disk((str(raw), sum(left.values())), (str(work), text), *([(out, text)] if out else []))
        total = sum(sizes.values())
        print(f"{dataset.repo}: {len(left)} of {len(sizes)} files to get, {total / 1e6:,.1f} MB in all", flush=True)
        with ended_at_once():
            snapshot_download(
                dataset.repo,
                repo_type="dataset",
                revision=commit,
                allow_patterns=list(dataset.patterns),
                ignore_patterns=dataset.ignored,
                local_dir=raw,
                max_workers=DOWNLOAD_WORKERS,
            )
    left = missing_files(raw, sizes)
    if left:
        raise UserError(f"{raw}: {next(iter(left))} did not come whole; start again, it goes on")
    write_whole(marker, json.dumps({"source": source, "commit": commit, "files": sizes}, indent=1).encode())
    return listed(raw, sizes)


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Signals end the process, without waiting for the threads of a download: what they have is kept by the hub's
    library, which goes on from there.
    """

    def end(number: int, frame: object) -> None:
        print(f"\n{PROGRAM}: stopped; start again, it goes on", file=sys.stderr, flush=True)
        os._exit(128 + number)

    answered = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in answered}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def missing_files(raw: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Those of `sizes` that are not in the folder, or are of another size."""

    def size_of(path: str) -> int:
        try:
            return (raw / path).stat().st_size
        except OSError:
            return -1

    return {path: size for path, size in sizes.items() if size_of(path) != size}


def listed(raw: Path, sizes: dict[str, int]) -> list[InputFile]:
    return [
        InputFile(str(raw / path), path, sizes[path], str((raw / path).stat().st_mtime_ns))
        for path in sorted(sizes, key=lambda path: path.split("/"))
    ]


def list_repository(dataset: Dataset, revision: str) -> tuple[str, dict[str, int]]:
    """The commit of `revision`, and the sizes of the dataset's files in it, by path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi()
    commit = api.dataset_info(dataset.repo, revision=revision).sha
    tree = api.list_repo_tree(dataset.repo, recursive=True, revision=commit, repo_type="dataset")
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    wanted = list(filter_repo_objects(sizes, allow_patterns=list(dataset.patterns), ignore_patterns=dataset.ignored))
    patterns = "', '".join(dataset.patterns)
    if not wanted:
        there = ", ".join(list(sizes)[:3]) or "nothing"
        raise UserError(
            f"{dataset.repo}: no files like '{patterns}' among its {len(sizes)} ({there} ...); see --pattern"
        )
    for path in wanted:
        if not suffix_of(path):
            raise UserError(
                f"{dataset.repo}: '{path}' is no file of documents; give a --pattern of names that end in "
                f"{', '.join(SUFFIXES)}"
            )
    return commit, {path: sizes[path] for path in wanted}


@contextlib.contextmanager
def explained(repo: str, folder: Path) -> Iterator[None]:
    """Errors of the hub, the network and the disk as UserErrors that tell what to do. A token is in none of them."""
    try:
        yield
    except Exception as error:
        # LocalEntryNotFoundError tells only that the file is not here either; behind it is the reason.
        reason = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ else error
        message = explain(reason, repo, folder)
        if message is None:
            raise
        raise UserError(without_token(" ".join(message.split()))) from None


def explain(error: BaseException, repo: str, folder: Path) -> str | None:
    """One line; None for what is not the user's fault, or in one line already."""
    from huggingface_hub import errors

    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/datasets/{repo}"
    log_in = "set HF_TOKEN to a token of yours, or run `hf auth login`"
    if isinstance(error, errors.HFValidationError):
        return f"'{repo}' is not the name of a dataset such as org/name"
    if isinstance(error, UnicodeError):
        return "HF_TOKEN is no token; set it to one of yours, or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access at {page} and {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo}: no such dataset on the hub, or a private one; see {page}, or {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: no such --revision; see {page}/commits/main"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo}: HF_HUB_OFFLINE is set, and not all files are here; unset it"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        advice = {
            401: f"the token is not valid; {log_in}",
            403: f"the token gives no access; ask for it at {page}",
            404: f"not found; see {page}",
            429: f"too many requests; wait some minutes, and {log_in}, which is allowed more of them",
        }
        return f"{repo}: the hub answers {status}: {advice.get(status, 'start again later, it goes on')}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"{folder}: cannot write: {error.strerror}; started again it goes on"
    # The library that huggingface_hub asks with differs between its versions.
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests"):
        told = f"{type(error).__name__}: {first_line(error)}"
        return f"{repo}: the download stopped ({told}); is the network there? start again, it goes on"
    return None


def without_token(message: str) -> str:
    from huggingface_hub import get_token

    for secret in filter(None, (get_token(), os.environ.get("HF_TOKEN", "").strip())):
        message = message.replace(secret, "(the token)")
    return without_credentials(message)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; start again, it goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        if os.environ.get("LINGUA_TRACEBACK"):
            raise
        sys.exit(f"{PROGRAM}: {' '.join(str(error).split())}")

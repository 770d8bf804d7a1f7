"""Downloads a tokenizer, tries it, and says how to train with it.

    python setup/download_tokenizer.py llama3 tokenizers/llama3 --api_key hf_...   # .../original/tokenizer.model
    python setup/download_tokenizer.py llama2 tokenizers/llama2                    # .../tokenizer.model
    python setup/download_tokenizer.py cl100k_base tokenizers                      # .../cl100k_base.tiktoken

llama2, llama3 and gemma come from the Hugging Face hub, below the folder as they lie in their repositories. Their
licences have to be accepted there, by the owner of the token: --api_key, else HF_TOKEN, else that of `hf auth login`.
Any other name is one of tiktoken's encodings, which need no token. Training splits text by Llama 3's rule, which is
that of cl100k_base but for whitespace at the end of a text; whether another one's differs is told.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import tiktoken

from lingua.args import check_writable, first_line, user_path, without_credentials
from lingua.errors import UserError
from lingua.tokenizer import LLAMA3_SPLIT_PATTERN, N_TIKTOKEN_SPECIALS, Tokenizer, build_tokenizer


class HubFile(NamedTuple):
    """Where a tokenizer lies on the hub, which of ours reads it, and how many words it has, special ones included."""

    repo_id: str
    file: str
    kind: str
    n_words: int


HUB_FILES = {
    "llama2": HubFile("meta-llama/Llama-2-7b", "tokenizer.model", "sp", 32_000),
    "llama3": HubFile("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model", "tiktoken", 128_256),
    "gemma": HubFile("google/gemma-2b", "tokenizer.model", "sp", 256_000),
}
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
HOW_TO_GIVE = f"make a token at {TOKENS_PAGE}, and give it by --api_key or HF_TOKEN"

# Text that rules of splitting differ on: contractions, digits, line ends, runs of spaces, capitals, marks, slashes.
SPLIT_PROBE = (
    "It's WE'LL 12345678 a1b2 x_y=(z);\r\n\n  deux   mots\t\n HelloWorld's e\u0301 a/b/\n!!\n\n 中文12 \u00a0."
)


def download(name: str, folder: Path, api_key: str | None) -> None:
    """Bring tokenizer `name` below `folder`, and tell where it is; nothing is done where it is already.

    Raises UserError, one line with what to do, if it cannot be had or is not what it should be. It is there whole or
    not at all.
    """
    if name not in HUB_FILES and name not in tiktoken.list_encoding_names():
        known = [*HUB_FILES, *sorted(tiktoken.list_encoding_names())]
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{name!r} must be one of {', '.join(known)}{hint}")
    path = folder / (HUB_FILES[name].file if name in HUB_FILES else f"{name}.tiktoken")
    if path.exists():
        try:
            tokenizer = load(name, path)
        except ValueError as error:
            raise UserError(f"{path} is there already and {error}; move it away, or name another folder") from None
        say(f"{path} is there already")
    else:
        tokenizer = fetch(name, path, api_key)
        say(f"written to {path}")
    say(f"{tokenizer.n_words:,} words, BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}")
    say(f"train with data.tokenizer.name={kind_of(name)} {shlex.quote(f'data.tokenizer.path={path}')}")


def fetch(name: str, path: Path, api_key: str | None) -> Tokenizer:
    """Download tokenizer `name`, try it, and move it to `path`. Raises UserError as `download` does."""
    check_writable("SAVE_PATH", path.parent, needed=0)
    # A folder that has been there before, so that no new ones are left where nothing comes of it.
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=existing) as partial:
            if name in HUB_FILES:
                part = fetch_from_hub(HUB_FILES[name], Path(partial), api_key)
            else:
                part = fetch_encoding(name, Path(partial))
            try:
                tokenizer = load(name, part)
            except ValueError as error:
                raise UserError(f"what was downloaded {error}") from None
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror or first_line(error)})") from None
    return tokenizer


def say(line: str) -> None:
    print(f"download_tokenizer: {without_credentials(line)}", flush=True)


def kind_of(name: str) -> str:
    return HUB_FILES[name].kind if name in HUB_FILES else "tiktoken"


def load(name: str, path: Path) -> Tokenizer:
    """The tokenizer in a file. Raises UserError if it is not the one called `name`, from the verb on."""
    try:
        tokenizer = build_tokenizer(kind_of(name), str(path))
    except ValueError as error:
        # The rest of it is about config keys.
        reason = str(error).removeprefix(f"data.tokenizer.path={str(path)!r}: ").partition("; ")[0]
        raise UserError(f"is not {name}'s tokenizer: {reason}") from None
    n_words = HUB_FILES[name].n_words if name in HUB_FILES else tokenizer.n_words
    if tokenizer.n_words != n_words:
        raise UserError(f"is not {name}'s tokenizer: it has {tokenizer.n_words:,} words, not {n_words:,}")
    return tokenizer


# --- Hugging Face -------------------------------------------------------------------------------------------------


def fetch_from_hub(wanted: HubFile, folder: Path, api_key: str | None) -> Path:
    """Download a file into `folder`. Raises UserError for what the hub or the network say, OSError for the disk."""
    # Here, and not above: it takes a second, and tiktoken's encodings do without.
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
    from huggingface_hub.constants import ENDPOINT, HF_TOKEN_PATH
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()  # its warnings are about attempts that it makes again
    try:
        token = api_key or get_token()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"the file of the Hugging Face token, {HF_TOKEN_PATH}, cannot be read ({reason}): mend or remove it, or "
            "give a token by --api_key or HF_TOKEN"
        ) from None
    if token and not re.fullmatch(r"[!-~]+", token):
        # An HTTP library would show it in its complaint.
        raise UserError(f"the token has a space or another character that no token has; copy it from {TOKENS_PAGE}")
    say(f"{wanted.repo_id}: {wanted.file}, from {ENDPOINT}")
    with explained(wanted, bool(token), ENDPOINT):
        # By itself first: an answer that will not change is told at once, without attempts to do without network.
        metadata = get_hf_file_metadata(hf_hub_url(wanted.repo_id, wanted.file), token=token or False)
    if metadata.commit_hash is None:
        raise UserError(f"what answers at {ENDPOINT} is no Hugging Face hub: check HF_ENDPOINT, and the proxy")
    check_writable("SAVE_PATH", folder, needed=metadata.size or 0)
    with explained(wanted, bool(token), ENDPOINT):
        path = hf_hub_download(
            wanted.repo_id, wanted.file, revision=metadata.commit_hash, token=token or False, local_dir=folder
        )
    return Path(path)


@contextmanager
def explained(wanted: HubFile, has_token: bool, endpoint: str) -> Iterator[None]:
    """Errors of the hub's library as UserErrors of one line, and those of the disk as they are."""
    try:
        yield
    except Exception as error:
        # LocalEntryNotFoundError says only that the file is not in the cache either; behind it is the reason.
        reason = (error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" else None) or error
        if is_of_the_disk(reason):
            raise reason from None
        raise UserError(explain(reason, wanted, has_token, endpoint)) from None


def explain(error: BaseException, wanted: HubFile, has_token: bool, endpoint: str) -> str:
    """What went wrong between here and the hub, and what to do."""
    from huggingface_hub import errors

    repo, page = wanted.repo_id, f"https://huggingface.co/{wanted.repo_id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        if not has_token:
            return f"{repo} is gated: accept the licence at {page}, {HOW_TO_GIVE}"
        return (
            f"{repo} is gated, and the token's owner has no access: accept the licence at {page} (it may take some "
            f"time to be granted), and let the token read gated repositories at {TOKENS_PAGE}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        without = "" if has_token else f"; it may be hidden from those without a token: {HOW_TO_GIVE}"
        return f"no repository {repo} at {endpoint}{without or ' that this token may see'}"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return f"{repo} has no file {wanted.file} at {endpoint}"
    if status == 401:
        return f"the token is not valid (--api_key, else HF_TOKEN, else that of `hf auth login`); {HOW_TO_GIVE}"
    if status == 403:
        return f"the hub forbids it (403): let the token read gated repositories at {TOKENS_PAGE}"
    if status == 429:
        less = "" if has_token else ", or give a token, which is allowed more (--api_key or HF_TOKEN)"
        return f"too many requests to {endpoint} from here (429): wait some minutes{less}"
    if status is not None:
        return f"{endpoint} answers with its own error ({status}): try again later"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids downloads: unset it"
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return f"no connection to {endpoint} ({what}): check the network and its proxy, or set HF_ENDPOINT to a mirror"


def is_of_the_disk(error: BaseException) -> bool:
    """Errors of HTTP libraries may be OSErrors too, but without a number, or are ConnectionErrors."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)


# --- tiktoken -----------------------------------------------------------------------------------------------------


def fetch_encoding(name: str, folder: Path) -> Path:
    """Write the ranks of one of tiktoken's encodings into `folder`, as lines "<base64> <rank>".

    Raises UserError if it cannot be had, or cannot be told in such a file.
    """
    say(f"{name}, by the package tiktoken")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_of_the_disk(error):
            raise UserError(f"tiktoken's cache: {error.filename}: {error.strerror}; see TIKTOKEN_CACHE_DIR") from None
        what = " ".join(str(error).split())
        what = what if len(what) < 120 else type(error).__name__
        raise UserError(
            f"tiktoken cannot get {name} ({what}): check the network and its proxy, or set TIKTOKEN_CACHE_DIR to a "
            "folder in which tiktoken has it"
        ) from None
    ranks = encoding._mergeable_ranks
    missing = set(range(len(ranks))).difference(ranks.values())
    if missing:
        raise UserError(
            f"{name} has a special token among the others, at {min(missing)}; data.tokenizer.name=tiktoken reads only "
            "ranks without gaps, such as those of cl100k_base and o200k_base"
        )
    if split(encoding._pat_str) != split(LLAMA3_SPLIT_PATTERN):
        say(
            f"note: {name} splits text by another rule than data.tokenizer.name=tiktoken, which has Llama 3's (that "
            f"of cl100k_base): the words are the same, but a text's token ids are not always those of {name} itself"
        )
    say(f"its own special tokens are left out; Llama 3's {N_TIKTOKEN_SPECIALS} follow the {len(ranks):,} ranks")
    path = folder / f"{name}.tiktoken"
    with open(path, "wb") as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
    return path


def split(pattern: str) -> list[int]:
    """How a rule of splitting cuts SPLIT_PROBE: the same rule may be written in several ways."""
    # With every stretch of the text in the vocabulary, each match of the rule becomes one token.
    data = SPLIT_PROBE.encode()
    stretches = {data[start:stop]: 0 for start, stop in combinations(range(len(data) + 1), 2)}
    tokens = dict.fromkeys([bytes([byte]) for byte in range(256)]) | stretches
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary(SPLIT_PROBE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Downloads a tokenizer and checks it.")
    parser.add_argument("name", help=f"{', '.join(HUB_FILES)}, or an encoding of tiktoken's such as cl100k_base")
    parser.add_argument("save_path", metavar="SAVE_PATH", type=user_path, help="folder to put it into")
    parser.add_argument(
        "--api_key",
        metavar="HF_TOKEN",
        help="token of the Hugging Face hub. Others on this machine can see arguments, with ps; the variable HF_TOKEN "
        "and `hf auth login` show it to nobody",
    )
    # Not parse_args, which repeats what it does not know, and that may be a token in a wrong place.
    args, unknown = parser.parse_known_args()
    if unknown:
        parser.error("too many arguments; wanted: NAME SAVE_PATH --api_key HF_TOKEN")
    api_key = (args.api_key or "").strip() or None
    try:
        download(args.name, args.save_path, api_key)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        line = without_credentials(" ".join(str(error).split()))
        for secret in filter(None, (api_key, os.environ.get("HF_TOKEN", "").strip())):
            line = line.replace(secret, "(the token)")
        sys.exit(f"download_tokenizer: {re.sub(r'hf_[A-Za-z0-9]{8,}', '(a token)', line)}")


if __name__ == "__main__":
    main()

"""Tasks of EleutherAI's lm-eval (0.4.x), answered by a generator.

The first rank runs lm-eval, as a single process would: it loads tasks, makes requests, works out metrics. What the
requests ask for, all ranks work out together (`SharedGenerator`). Which sequences are computed in one batch depends on
the requests alone, and batches are dealt out whole, so several ranks get the numbers that one gets.

Requests are encoded, cut and scored as lm-eval's own Hugging Face backend does it, so that numbers can be compared.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table

from apps.main.generate import (
    GeneratorArgs,
    PackedCausalTransformerGenerator,
    Progress,
    batches_by_length,
    batches_for_generation,
    cut_prompts,
    sampling_seed,
    validate_generator_args,
)
from apps.main.validation import EvaluationStopped
from lingua.args import first_line
from lingua.distributed import any_rank, broadcast_object, gather_objects, raise_on_all_ranks, rank_and_size
from lingua.errors import UserError
from lingua.launch import oom_as_user_error

logger = logging.getLogger(__name__)

# Seconds between the first rank's signs of life while lm-eval loads tasks or works out metrics: the others wait no
# longer than the process group's time limit.
HEARTBEAT = 5.0

# What lm-eval's tasks call the limit of a continuation, the first one counting.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

# Arguments of generation that change nothing at these values.
_NEUTRAL = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "use_cache": True,
    "num_return_sequences": 1,
}

# What simple_evaluate takes and a config has no use for: the model is ours.
_NOT_OURS = ("model", "model_args", "batch_size", "max_batch_size", "task_manager", "evaluation_tracker")
# Of published configs, without an effect here.
_IGNORED = ("device", "verbosity")


# --- arguments -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _index(include_path: str | None, with_lm_evals_own: bool) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=with_lm_evals_own)


def _task_manager(harness: dict[str, Any]) -> TaskManager:
    """Knows lm-eval's thousands of tasks, which takes seconds, where those of include_path are not enough."""
    include_path = harness.get("include_path")
    names = {_name_of(task) for task in harness["tasks"]}
    if include_path is not None and names <= set(_index(include_path, False).all_tasks):
        return _index(include_path, False)
    return _index(include_path, True)


def _name_of(task: str | dict[str, Any]) -> Any:
    return task.get("task", task.get("group")) if isinstance(task, dict) else task


def _is_complete(task: str | dict[str, Any]) -> bool:
    """Whether it is a task's whole config, or a file with one, which needs no entry in lm-eval's index."""
    if isinstance(task, dict):
        return "dataset_path" in task or "custom_dataset" in task or "group" in task
    return task.endswith((".yaml", ".yml"))


def _load_tasks(manager: TaskManager, tasks: list[str | dict[str, Any]]) -> list[Any]:
    """For simple_evaluate, which takes a mapping for a whole config: of a known task it may name what is to differ."""
    loaded: list[Any] = []
    for task in tasks:
        if isinstance(task, str) or _is_complete(task):
            loaded.append(task)
        else:
            # Within a group lm-eval reads it so.
            group = manager.load({"group": "of one task", "task": [task]})["groups"]["of one task"]
            loaded += list(group)
    return loaded


def validate_harness_args(harness: Any, prefix: str = "") -> None:
    """Raises UserError, one line that names the key, for arguments that lm-eval does not take and unknown tasks."""
    key = f"{prefix}harness"
    if not isinstance(harness, dict):
        raise UserError(f"{key}: '{harness}' where a section of lm_eval.simple_evaluate's arguments is wanted")
    known = [name for name in inspect.signature(lm_eval.simple_evaluate).parameters if name not in _NOT_OURS]
    known.append("include_path")
    for name in harness:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{key}.{name}: unknown key; {hint}")
    if harness.get("apply_chat_template"):
        raise UserError(f"{key}.apply_chat_template: the tokenizers here have no chat template; set it to false")
    tasks, include_path = harness.get("tasks"), harness.get("include_path")
    if not isinstance(tasks, list) or not tasks:
        raise UserError(f"{key}.tasks: wanted a list of tasks, such as [hellaswag, {{task: nq_open, num_fewshot: 5}}]")
    for task in tasks:
        if not isinstance(_name_of(task), str):
            raise UserError(f"{key}.tasks: '{task}' is neither a name nor a mapping with `task`")
    limit, n_shots = harness.get("limit"), harness.get("num_fewshot")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
        raise UserError(f"{key}.limit: '{limit}' is no number above 0 (below 1: a part of each task's documents)")
    if n_shots is not None and (isinstance(n_shots, bool) or not isinstance(n_shots, int) or n_shots < 0):
        raise UserError(f"{key}.num_fewshot: '{n_shots}' is no whole number of 0 or more")
    if include_path is not None:
        _refuse_broken_tasks(f"{key}.include_path", include_path)
    try:
        with _quiet():
            manager = _task_manager(harness)
    except Exception as error:  # of any kind, out of whatever YAML lies there
        raise UserError(f"{key}.include_path: '{include_path}' cannot be read ({first_line(error)})") from None
    for task in tasks:
        name = _name_of(task)
        if not _is_complete(task) and name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "set harness.include_path to the folder of your own tasks"
            raise UserError(f"{key}.tasks: lm-eval knows no task '{name}'; {hint}")


def _refuse_broken_tasks(key: str, include_path: Any) -> None:
    """lm-eval passes over a file that is no YAML, and then does not know the task in it."""
    if not isinstance(include_path, str) or not Path(include_path).is_dir():
        raise UserError(f"{key}: no folder '{include_path}'")
    for file in sorted(Path(include_path).rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else str(file)
            raise UserError(f"{where}: not YAML ({getattr(error, 'problem', None) or first_line(error)})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's reports of each of its steps, and of each metric whose defaults a task relies on."""
    levels = {"lm_eval": logging.WARNING, "lm_eval.api.task": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


# --- many ranks, one generator ---------------------------------------------------------------------------------------


class _Scoring(NamedTuple):
    """Sequences, and of each how many of its first tokens are given."""

    sequences: list[list[int]]
    n_given: list[int]


class _Generating(NamedTuple):
    prompts: list[list[int]]
    args: GeneratorArgs
    number: int


class SharedGenerator:
    """The generators of all ranks as one: the first rank asks, and all work. The others `serve()` meanwhile.

    Args:
        should_stop: asked between batches, on every rank; where any says yes, all raise EvaluationStopped.
    """

    def __init__(self, generator: PackedCausalTransformerGenerator, should_stop: Callable[[], bool] | None = None):
        self.generator, self.should_stop = generator, should_stop
        self.rank, self.size = rank_and_size()
        self._talking = threading.Lock()
        self._n_calls = 0

    def score(self, sequences: list[list[int]], n_given: list[int]) -> list[tuple[float, bool]]:
        """Of each sequence: the summed log-likelihood of its tokens but the first `n_given`, and whether all of them
        are the likeliest. For the first rank.
        """
        return self._ask(_Scoring(sequences, n_given))

    def continue_prompts(self, prompts: list[list[int]], args: GeneratorArgs) -> list[str]:
        """The text that follows each prompt. For the first rank."""
        self._n_calls += 1
        return self._ask(_Generating(prompts, args, self._n_calls))

    def serve(self) -> None:
        """Works for the first rank until that leaves `asking`. For the other ranks."""
        stopped = None
        while (task := broadcast_object("nothing yet")) != "the end":
            if task != "nothing yet":
                try:
                    self._work(task)
                except EvaluationStopped as error:  # the first rank has it, too, and brings this to its end
                    stopped = error
        if stopped is not None:
            raise stopped

    @contextmanager
    def asking(self) -> Iterator[None]:
        """For the first rank: as long as it may ask. After it the others are free."""
        if self.size == 1:
            yield
            return
        done = threading.Event()

        def show_life() -> None:
            while not done.wait(HEARTBEAT):
                with self._talking:
                    if not done.is_set():
                        broadcast_object("nothing yet")

        heart = threading.Thread(target=show_life, daemon=True)
        heart.start()
        try:
            yield
        finally:
            done.set()
            heart.join()
            broadcast_object("the end")

    def _ask(self, task: _Scoring | _Generating) -> list[Any]:
        with self._talking:
            if self.size > 1:
                broadcast_object(task)
            shares = self._work(task)
        for share in shares:
            if isinstance(share, Exception):
                raise share
        merged = {number: answer for share in shares for number, answer in share.items()}
        return [merged[number] for number in range(len(task[0]))]

    def _work(self, task: _Scoring | _Generating) -> list[dict[int, Any] | Exception]:
        """What each rank has found for its share of the requests, or the error that it met."""
        if isinstance(task, _Scoring):
            # The last token of a sequence is predicted and not read.
            batches = batches_by_length([len(s) - 1 for s in task.sequences], self.generator.args.max_tokens)
        else:
            batches = batches_for_generation(task.prompts, task.args)
        progress = Progress(len(task[0]), "requests answered", self.generator.args.show_progress)
        mine: dict[int, Any] | Exception = {}
        for first in range(0, len(batches), self.size):
            asked_to = self.should_stop is not None and self.should_stop()
            # Told at each round, which also keeps the ranks together: nobody waits for another longer than a batch.
            stopping, failing = any_rank(asked_to, isinstance(mine, Exception))
            if stopping:
                raise EvaluationStopped
            if failing:
                break
            round_of = batches[first : first + self.size]
            if self.rank < len(round_of):
                batch = round_of[self.rank]
                max_tokens = self.generator.args.max_tokens
                too_large = f"generator.max_tokens: {max_tokens} tokens at once do not fit a GPU's memory; lower it"
                try:
                    with oom_as_user_error(too_large):
                        answers = self._answer(task, batch, first + self.rank, progress)
                        mine.update(zip(batch, answers, strict=True))
                except Exception as error:
                    if self.size == 1:
                        raise
                    # The first rank is told, and raises it: in words, since not every exception can be sent.
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    mine = ValueError(f"{kind}{first_line(error)}")
            if self.rank == 0:
                progress.add(sum(map(len, round_of)))
        return gather_objects(mine)

    def _answer(self, task: _Scoring | _Generating, batch: list[int], number: int, progress: Progress) -> list[Any]:
        if isinstance(task, _Generating):
            seed = sampling_seed(task.args.seed + task.number, number)
            prompts = [task.prompts[i] for i in batch]
            return [run.text for run in self.generator.continue_batch(prompts, task.args, seed, progress)]
        scores = self.generator.score_batch([task.sequences[i] for i in batch])
        n_given = [task.n_given[i] for i in batch]
        return [
            (ll[n - 1 :].double().sum().item(), bool(greedy[n - 1 :].all()))
            for (ll, greedy), n in zip(scores, n_given, strict=True)
        ]


# --- lm-eval's side --------------------------------------------------------------------------------------------------


class LinguaLM(TemplateLM):
    """The model that lm-eval sees."""

    def __init__(self, shared: SharedGenerator):
        super().__init__()
        self.shared = shared
        self.generator = shared.generator
        self.max_length = self.generator.model.max_seqlen

    @property
    def eot_token_id(self) -> int:
        return self.generator.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        tokenizer = self.generator.tokenizer
        token = tokenizer.bos_id if self.generator.add_bos else tokenizer.eos_id
        if token < 0:
            raise UserError("data.tokenizer: has neither BOS nor EOS, one of which an empty context needs")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        add_bos = self.generator.add_bos if add_special_tokens is None else add_special_tokens
        add_bos = add_bos and self.generator.tokenizer.bos_id >= 0
        return self.generator.tokenizer.encode(string, add_bos=add_bos, add_eos=False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._loglikelihood_tokens([(request.args, *self._encode_pair(*request.args)) for request in requests])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the context, and those of the continuation: what `context + continuation` has beyond the context's.

        Spaces that end the context belong to the continuation, as in lm-eval. Where a continuation has no token beyond
        the context's, as where one token spans both, the two are encoded apart. An empty one has none.

        Raises UserError where the tokenizer drops all of a continuation.
        """
        if continuation and not context:
            return [self.prefix_token_id], self._encode_apart(continuation)
        start = context.rstrip()
        rest = context[len(start) :] + continuation
        given = self.tok_encode(start)
        scored = self.tok_encode(start + rest)[len(given) :]
        if not scored and continuation:
            scored = self._encode_apart(rest)
        return given, scored

    def _encode_apart(self, continuation: str) -> list[int]:
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if not tokens:
            raise UserError(
                f"harness.tasks: the tokenizer has no token for the continuation {continuation!r}, so it has no score"
            )
        return tokens

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        sequences, n_given, n_cut = [], [], 0
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"harness.tasks: a continuation of {len(continuation)} tokens is longer than the model's "
                    f"max_seqlen={self.max_length}"
                )
            whole = (context or [self.prefix_token_id]) + continuation
            n_cut += len(whole) > self.max_length + 1
            whole = whole[-(self.max_length + 1) :]
            sequences.append(whole)
            n_given.append(len(whole) - len(continuation))
        if n_cut:
            logger.warning(
                "%s of %s requests are cut on the left to the model's max_seqlen=%s",
                n_cut,
                len(requests),
                self.max_length,
            )
        # An empty continuation has nothing to be scored, and is certain.
        asked = [i for i, (sequence, n) in enumerate(zip(sequences, n_given, strict=True)) if n < len(sequence)]
        answers = self.shared.score([sequences[i] for i in asked], [n_given[i] for i in asked])
        results = dict(zip(asked, answers, strict=True))
        ordered = [results.get(i, (0.0, True)) for i in range(len(requests))]
        for (request, _, _), answer in zip(requests, ordered, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return ordered

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            parts[owner].append(likelihood)
        totals = [math.fsum(part) for part in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        # Requests with the same arguments are continued together.
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        texts: dict[int, str] = {}
        for numbers in alike.values():
            args = generation_args(self.generator.args, requests[numbers[0]].args[1])
            prompts = [self.generator.encode(requests[number].args[0]) for number in numbers]
            prompts = cut_prompts(prompts, args, self.max_length)
            texts.update(zip(numbers, self.shared.continue_prompts(prompts, args), strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]


def generation_args(defaults: GeneratorArgs, given: dict[str, Any]) -> GeneratorArgs:
    """How to continue a request: as its task says, greedily where that says nothing, and by default to the config's
    `max_gen_len`.

    Raises UserError for arguments of another kind of generation.
    """
    given = dict(given)
    lengths = [given.pop(name) for name in _LENGTH_NAMES if name in given]
    until = given.pop("until", None) or []
    do_sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if do_sample else 0.0
    args = replace(
        defaults,
        temperature=0.0 if do_sample is False else float(temperature),
        top_p=given.pop("top_p", None),
        top_k=given.pop("top_k", None) or None,
        max_gen_len=int(next((length for length in lengths if length is not None), defaults.max_gen_len)),
        until=[until] if isinstance(until, str) else [stop for stop in until if stop],
    )
    for name, value in given.items():
        if name not in _NEUTRAL or _NEUTRAL[name] != value:
            raise UserError(f"generation_kwargs.{name}: {value!r} is not supported; leave it out of the task")
    validate_generator_args(args, "generation_kwargs.")
    return args


def run_harness(
    harness: dict[str, Any],
    generator: PackedCausalTransformerGenerator,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any] | None:
    """What lm_eval.simple_evaluate returns for the tasks of `harness`; None on other ranks than the first.

    All ranks call it together. Raises UserError (on one rank, and SystemExit on the others) where a task fails, and
    EvaluationStopped where `should_stop` says so.
    """
    shared = SharedGenerator(generator, should_stop)
    results = None
    with raise_on_all_ranks():
        if shared.rank == 0:
            arguments = {k: v for k, v in harness.items() if k not in (*_IGNORED, "include_path")}
            try:
                with shared.asking(), _quiet():
                    manager = _task_manager(harness)
                    arguments["tasks"] = _load_tasks(manager, harness["tasks"])
                    results = lm_eval.simple_evaluate(model=LinguaLM(shared), task_manager=manager, **arguments)
            except EvaluationStopped:
                raise
            except ValueError as error:  # of ours, or of lm-eval's, which says what is wrong but not where
                raise UserError(f"harness: {error}") from error
            # Of any kind, out of the code of tasks and of those who made their data; some call sys.exit.
            except (Exception, SystemExit) as error:
                raise UserError(
                    f"harness.tasks: lm-eval failed ({type(error).__name__}: {first_line(error)})"
                ) from error
        else:
            shared.serve()
    return results


def tables(results: dict[str, Any]) -> str:
    """What lm-eval prints at the end: all tasks, and groups where there are any."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))


def to_json(results: dict[str, Any]) -> str:
    """With what JSON does not know as lm-eval writes it."""
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)

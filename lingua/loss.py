"""The output layer and its cross-entropy in one: neither the logits nor their gradient are ever held as a whole.

Tokens are processed in chunks. A chunk's logits give its losses, are overwritten with their own gradient, and give the
gradients of the chunk's tokens and, summed over chunks in fp32, of the weight. So all three matrix products are in the
forward pass; the backward pass scales their results, once. Between the products there are two Triton kernels on a GPU
(loss_kernels.py), elsewhere PyTorch's operators. Nothing waits for the GPU.

Under tensor parallelism each rank has some rows of the weight. It computes the logits of these words for all tokens,
and the ranks exchange three numbers for each token.

Suffixes: N tokens, C dim, V words (of this rank).
"""

from __future__ import annotations

import torch

from lingua.product_key.xformer_embeddingbag import runs_on_triton
from lingua.sharding import is_split

# The label of tokens without a loss, as in torch.nn.functional.cross_entropy.
IGNORED = -100

# Logits of a chunk: on a CPU 16 MiB in fp32, which its caches hold; elsewhere 512 MiB in bf16. And the fewest tokens of
# a chunk: its products read the whole weight and its gradient.
CHUNK_ON_CPU, CHUNK = 2**22, 2**28
LEAST_TOKENS = 128


def tokens_of_chunk(n_tokens: int, n_words: int, device: torch.device) -> int:
    """Tokens whose logits are held at once. Chunks are equally large, but for the last one."""
    most = max((CHUNK_ON_CPU if device.type == "cpu" else CHUNK) // n_words, LEAST_TOKENS)
    n_chunks = max(-(-n_tokens // most), 1)
    return -(-n_tokens // n_chunks)


def linear_cross_entropy(h: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the logits `h @ weight.T`, a scalar in fp32 (fp64 for such inputs). Backward runs once.

    Args:
        h: (..., C), any floating type.
        weight: (V, C). A DTensor where its rows are split over ranks; `h` is one then too, whole on each of them, and
            so is the result.
        target: (...) ids of all ranks' words, int64, or -100 for tokens that do not count. NaN if none does.

    The matrix products are in autocast's type where that is on. Raises RuntimeError for other ids (a GPU reports it
    later, as an assertion that failed).
    """
    if not is_split(weight):
        return _mean_loss(h, weight, target, "", 1, 0)
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, part = weight.device_mesh, weight.to_local()
    split = (mesh.get_group().group_name, mesh.size(), mesh.get_local_rank() * len(part))
    # Each rank has the share of a token's gradient that comes from its words.
    loss = _mean_loss(h.to_local(grad_placements=[Partial()]), part, target, *split)
    return DTensor.from_local(loss, mesh, [Replicate()], run_check=False)


def _mean_loss(h: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *split: str | int) -> torch.Tensor:
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    needs_gradients = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _Loss.apply(h.flatten(0, -2), weight, target.flatten(), dtype, needs_gradients, *split)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NC, weight_VC, target_N, *others):
        # The compiler gets one operator that it does not look into.
        compute = _operator if torch.compiler.is_compiling() else _sum_of_losses
        total, *gradients = compute(h_NC, weight_VC, target_N, *others)
        count = (target_N != IGNORED).sum()
        ctx.save_for_backward(count, *gradients)
        ctx.dtypes = h_NC.dtype, weight_VC.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad):
        count, grad_h_NC, grad_weight_VC = ctx.saved_tensors
        factor, (h_dtype, weight_dtype) = grad / count, ctx.dtypes
        # In place: the weight's gradient is large.
        gradients = grad_h_NC.to(h_dtype).mul_(factor), grad_weight_VC.mul_(factor).to(weight_dtype)
        return *gradients, None, None, None, None, None, None


def _sum_of_losses(
    h_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    target_N: torch.Tensor,
    dtype: torch.dtype,
    needs_gradients: bool,
    group: str,
    n_ranks: int,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum, and its gradients: of `h_NC`, of type `dtype`, and of `weight_VC`, in fp32 or more; empty if not needed.

    `first`: the number of this rank's first word.
    """
    h_NC, weight_VC, wide = h_NC.to(dtype), weight_VC.to(dtype), torch.promote_types(dtype, torch.float32)
    n_words = n_ranks * len(weight_VC)
    target_N = target_N.contiguous()  # a view of the batch; the kernels read it by its address
    is_valid = ((target_N >= 0) & (target_N < n_words)) | (target_N == IGNORED)
    torch._assert_async(is_valid.all(), f"target: ids must be in [0, {n_words}), or {IGNORED} for tokens to ignore")
    n_tokens = tokens_of_chunk(len(h_NC), len(weight_VC), h_NC.device)
    buffer = h_NC.new_empty(n_tokens, len(weight_VC))
    losses = h_NC.new_empty(len(h_NC), dtype=wide)
    grad_h = torch.empty_like(h_NC if needs_gradients else h_NC[:0])
    grad_weight = torch.zeros_like(weight_VC if needs_gradients else weight_VC[:0], dtype=wide)
    for start in range(0, len(h_NC), n_tokens):
        some = slice(start, start + n_tokens)
        h, target = h_NC[some], target_N[some]
        logits = torch.mm(h, weight_VC.T, out=buffer[: len(h)])
        losses[some] = _losses(logits, target, needs_gradients, group, n_ranks, first)
        if not needs_gradients:
            continue
        torch.mm(logits, weight_VC, out=grad_h[some])
        if dtype == wide or logits.is_cuda:
            unlike = {} if dtype == wide else {"out_dtype": wide}
            torch.addmm(grad_weight, logits.T, h, **unlike, out=grad_weight)
        else:
            grad_weight += torch.mm(logits.T, h)
    return losses.sum(), grad_h, grad_weight


def _losses(
    logits: torch.Tensor, target: torch.Tensor, needs_gradient: bool, group: str, n_ranks: int, first: int
) -> torch.Tensor:
    """(N,), of logits (N, V), which are overwritten: with their gradient, if it is needed."""
    counts = target != IGNORED
    if runs_on_triton(logits):
        from lingua import loss_kernels

        most, total, of_label = _over_ranks(loss_kernels.statistics(logits, target, first), group, n_ranks)
        if needs_gradient:
            loss_kernels.write_gradient(logits, target, first, most, total, IGNORED)
        return (total.log() + (most - of_label)).where(counts, 0)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))  # the logits themselves in fp32
    label = target - first
    is_here = (label >= 0) & (label < x.shape[1])
    label = label.where(is_here, 0)[:, None]
    of_label, own_most = x.gather(1, label).squeeze(1).where(is_here, 0), x.amax(1)
    own_total = x.sub_(own_most[:, None]).exp_().sum(1)
    most, total, of_label = _over_ranks(torch.stack([own_most, own_total, of_label]), group, n_ranks)
    if needs_gradient:
        x.mul_(((own_most - most).exp() / total).where(counts, 0)[:, None])
        logits.copy_(x.scatter_add_(1, label, -is_here.to(x.dtype)[:, None]))
    return (total.log() + (most - of_label)).where(counts, 0)


def _over_ranks(own: torch.Tensor, group: str, n_ranks: int) -> torch.Tensor:
    """From each rank's words to all: (3, N), the largest logit, the sum of exponentials relative to it, the label's."""
    if n_ranks == 1:
        return own
    send = torch.ops._c10d_functional
    every = send.wait_tensor(send.all_gather_into_tensor(own, n_ranks, group))
    most, total, of_label = every.view(n_ranks, *own.shape).unbind(1)
    highest = most.amax(0)
    return torch.stack([highest, (total * (most - highest).exp()).sum(0), of_label.sum(0)])


_operator = torch.library.custom_op("lingua::linear_cross_entropy", _sum_of_losses, mutates_args=())


@_operator.register_fake
def _(h_NC, weight_VC, target_N, dtype, needs_gradients, group, n_ranks, first):
    wide = torch.promote_types(dtype, torch.float32)
    grad_h, grad_weight = (x if needs_gradients else x[:0] for x in (h_NC, weight_VC))
    total = h_NC.new_empty((), dtype=wide)
    return total, torch.empty_like(grad_h, dtype=dtype), torch.empty_like(grad_weight, dtype=wide)

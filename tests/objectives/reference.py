"""Independent references in float64: values from NumPy by the textbook definitions, gradients from torch's autograd."""

import numpy as np
import torch

from opsa_jax.config import ObjectiveConfig

DIVERGENCES = ("forward", "reverse", "mix", "jsd")
SUPPORTS = [("full", "renormalise")] + [
    (support, subset) for support in ("teacher_topk", "student_topk") for subset in ("raw", "generalised", "renormalise", "tail")
]


def numpy_divergence(cfg: ObjectiveConfig, p_V: np.ndarray, q_V: np.ndarray) -> float:
    """D between two vectors of probabilities (student p, teacher q), summed over their tokens as they come."""

    def kl(a, b):
        return float(np.sum(a * np.log(a / b)))

    if cfg.divergence == "jsd":
        m_V = cfg.beta * q_V + (1 - cfg.beta) * p_V
        return cfg.beta * kl(q_V, m_V) + (1 - cfg.beta) * kl(p_V, m_V)
    a = {"forward": 1.0, "reverse": 0.0, "mix": cfg.mix}[cfg.divergence]
    return a * kl(q_V, p_V) + (1 - a) * kl(p_V, q_V)


def numpy_softmax(logits_V: np.ndarray) -> np.ndarray:
    e_V = np.exp(logits_V - logits_V.max())
    return e_V / e_V.sum()


def numpy_token(cfg: ObjectiveConfig, logits_s_V: np.ndarray, logits_t_V: np.ndarray) -> float:
    """The configured divergence of one position, from float64 logits."""
    p_V, q_V = numpy_softmax(logits_s_V / cfg.temperature), numpy_softmax(logits_t_V / cfg.temperature)
    if cfg.support == "full":
        return numpy_divergence(cfg, p_V, q_V)
    chosen_K = np.argsort(-(q_V if cfg.support == "teacher_topk" else p_V), kind="stable")[: cfg.k]
    p_K, q_K = p_V[chosen_K], q_V[chosen_K]
    if cfg.subset == "renormalise":
        return numpy_divergence(cfg, p_K / p_K.sum(), q_K / q_K.sum())
    if cfg.subset == "tail":
        others = np.setdiff1d(np.arange(p_V.size), chosen_K)
        if others.size:
            p_K, q_K = np.append(p_K, p_V[others].sum()), np.append(q_K, q_V[others].sum())
        return numpy_divergence(cfg, p_K, q_K)
    value = numpy_divergence(cfg, p_K, q_K)
    if cfg.subset == "generalised" and cfg.divergence != "jsd":
        a = {"forward": 1.0, "reverse": 0.0, "mix": cfg.mix}[cfg.divergence]
        value += a * np.sum(p_K - q_K) + (1 - a) * np.sum(q_K - p_K)
    return value


def torch_divergence(cfg: ObjectiveConfig, logits_s_NV: torch.Tensor, logits_t_NV: torch.Tensor, tokens_K=None) -> torch.Tensor:
    """The configured divergence [N], differentiable in the student's logits; tokens_K is the set of support=tokens."""
    logp_NV, logq_NV = (torch.log_softmax(x / cfg.temperature, -1) for x in (logits_s_NV, logits_t_NV.detach()))
    if cfg.support != "full":
        if cfg.support == "tokens":
            ids_NK = torch.tensor(tokens_K).expand(len(logp_NV), -1)
        else:
            ids_NK = (logq_NV if cfg.support == "teacher_topk" else logp_NV.detach()).topk(cfg.k).indices
        k = ids_NK.shape[-1]
        if cfg.subset == "tail" and k < logp_NV.shape[-1]:
            outside_NV = torch.ones_like(logp_NV).scatter(-1, ids_NK, 0.0).bool()
            rests = [torch.logsumexp(x.masked_fill(~outside_NV, -torch.inf), -1, keepdim=True) for x in (logp_NV, logq_NV)]
        logp_NV, logq_NV = logp_NV.gather(-1, ids_NK), logq_NV.gather(-1, ids_NK)
        if cfg.subset == "renormalise":
            logp_NV, logq_NV = torch.log_softmax(logp_NV, -1), torch.log_softmax(logq_NV, -1)
        elif cfg.subset == "tail" and k < outside_NV.shape[-1]:
            logp_NV, logq_NV = torch.cat([logp_NV, rests[0]], -1), torch.cat([logq_NV, rests[1]], -1)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    if cfg.divergence == "jsd":
        logm_NV = (cfg.beta * q_NV + (1 - cfg.beta) * p_NV).log()
        return (cfg.beta * q_NV * (logq_NV - logm_NV) + (1 - cfg.beta) * p_NV * (logp_NV - logm_NV)).sum(-1)
    a = {"forward": 1.0, "reverse": 0.0, "mix": cfg.mix}[cfg.divergence]
    forward_NV, reverse_NV = q_NV * (logq_NV - logp_NV), p_NV * (logp_NV - logq_NV)
    if cfg.support != "full" and cfg.subset == "generalised":
        forward_NV, reverse_NV = forward_NV + p_NV - q_NV, reverse_NV + q_NV - p_NV
    return (a * forward_NV + (1 - a) * reverse_NV).sum(-1)


def torch_loss(cfg: ObjectiveConfig, hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, tokens_K=None):
    """(loss, gradient in hs_ND, gradient in head_s_DV) of sum_n w_n D_n, as float64 NumPy arrays, from a materialised [N, V]."""
    hs, head_s, ht, head_t, w = (torch.tensor(np.asarray(x, np.float64)) for x in (hs_ND, head_s_DV, ht_ND, head_t_DV, w_N))
    hs.requires_grad_(), head_s.requires_grad_()
    V = min(head_s.shape[1], head_t.shape[1])
    loss = (w * torch_divergence(cfg, (hs @ head_s)[:, :V], (ht @ head_t)[:, :V], tokens_K)).sum()
    loss.backward()
    return loss.item(), hs.grad.numpy(), head_s.grad.numpy()

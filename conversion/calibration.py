"""Fitting a model's shared heads layer by layer, on the hidden states of calibration tokens.

The walk over the checkpoint brings one canonical layer at a time. Here the calibration tokens stand at that layer's
input, as the *converted* layers below left them. The layer with all its heads is the teacher: it shows what the
attention sees (moments for `fitting.py`) and what it should give (the target of the refitted output projection). Then
the tokens pass the converted layer. No class of the source is needed; one layer and the states are all that is held.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mqa_hf.attention_mqa import ATTENTION_NAME, eager_attention_forward
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.modeling_mqa import MQAAttention, MQADecoderLayer, MQAModel, project, rotate

from . import fitting

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FitOptions:
    """How heads are fitted.

    Attributes:
        refit: whether the output projection is refitted.
        queries: positions of each sequence at which the attention-averaged input is looked at.
        batch: sequences that pass a layer at once.
        held_out: the last sequences, which nothing is fitted on; the report is about them.
        device: where layers run.
        seed: of the choice of those positions.
    """

    refit: bool = True
    queries: int = 64
    batch: int = 8
    held_out: int = 8
    device: str = "cpu"
    seed: int = 0


def layer_config(config: MQAConfig) -> MQAConfig:
    config = copy.deepcopy(config)
    config._attn_implementation = ATTENTION_NAME
    return config


class Calibration:
    """The calibration tokens on their way through the layers.

    Args:
        config: canonical, with all the source's heads.
        pooled: with the heads and widths that are asked for.
        tokens: [N, T] token ids.
        options: see [`FitOptions`].
    """

    def __init__(self, config: MQAConfig, pooled: MQAConfig, tokens: torch.Tensor, options: FitOptions):
        self.config, self.pooled, self.options = layer_config(config), layer_config(pooled), options
        self.tokens = tokens
        self.device = torch.device(options.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        empty = {"num_hidden_layers": 0, "layer_types": [], "rope_layers": []}
        self.shell = MQAModel(MQAConfig(**{**config.to_dict(), **empty})).float().eval().to(self.device)
        # The shell makes masks and positions for every layer; explicit ones, of which rows can be taken.
        self.shell.config = copy.deepcopy(config)
        self.shell.config._attn_implementation = "eager"
        self.head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.lm_head_bias).to(self.device)
        self.states = torch.empty(0)
        self.teacher_states = torch.empty(0)

    # -- what stands outside the layers ---------------------------------------------------------------------------

    def take(self, tensors: Tensors) -> None:
        """Keep those tensors outside the layers that the tokens pass: embeddings, final norm, head."""
        own = {f"model.{name}": p for name, p in self.shell.named_parameters()}
        own |= {f"lm_head.{name}": p for name, p in self.head.named_parameters()}
        for name, tensor in tensors.items():
            if name in own:
                own[name].data.copy_(tensor)
        if self.config.tie_word_embeddings and self.shell.embed_tokens is not None:
            self.head.weight = self.shell.embed_tokens.weight

    def start(self) -> None:
        """Embed the tokens and settle what all layers share: positions and masks."""
        T = self.tokens.shape[1]
        position_ids = torch.arange(T, device=self.device)[None]
        embed = self.shell.embed_tokens
        assert embed is not None

        def enter(tokens: torch.Tensor) -> torch.Tensor:
            return self.shell.enter(embed(tokens.to(self.device)), position_ids).cpu()

        self.states = torch.cat([enter(self.tokens[rows]) for rows in self.rows(0, len(self.tokens))])
        self.teacher_states = self.states[-self.options.held_out :].clone()
        x = self.states[:1].to(self.device)
        self.angles = None if self.shell.rotary_emb is None else self.shell.rotary_emb(x, position_ids)
        masks = self.shell.make_masks(x, None, position_ids, None)
        self.mask_of = self.shell.position_bias(masks, None, x, None)

    def rows(self, start: int, stop: int) -> Iterator[slice]:
        for i in range(start, stop, self.options.batch):
            yield slice(i, min(i + self.options.batch, stop))

    # -- one layer ------------------------------------------------------------------------------------------------

    def fit(self, number: int, prefix: str, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
        """The converted layer, and how far its attention's output is from the teacher's on held-out tokens.

        Args:
            number: of the layer.
            prefix: of its tensors' canonical names.
            tensors: of the canonical layer with all its heads.

        Returns:
            Its tensors with fewer heads, and the report.
        """
        teacher = self.build(self.config, number, prefix, tensors)
        mask = self.mask_of(teacher, self.config.layer_types[number])
        fitted, report = self.fit_heads(teacher.self_attn, self.moments(teacher, mask))
        kept = {name: t for name, t in tensors.items() if ".self_attn." not in name or ".relative_bias." in name}
        new = {f"{prefix}self_attn.{name}": t for name, t in fitted.items()}
        student = self.build(self.pooled, number, prefix, {**kept, **new})
        if self.options.refit:
            self.refit(teacher, student, mask)
        report |= self.compare(teacher, student, mask)
        self.advance(teacher, student, mask)
        new = {f"{prefix}self_attn.{name}": t.cpu() for name, t in student.self_attn.state_dict().items()}
        return {**kept, **new}, report

    def build(self, config: MQAConfig, number: int, prefix: str, tensors: Tensors) -> MQADecoderLayer:
        layer = MQADecoderLayer(config, number).float().eval()
        known = layer.state_dict()  # a key bias that softmax does not see is among the tensors, but not in the layer
        state = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}
        layer.load_state_dict({name: tensor for name, tensor in state.items() if name in known})
        return layer.to(self.device)

    def attended(self, layer: MQADecoderLayer, x: torch.Tensor) -> torch.Tensor:
        """The input of a layer's attention."""
        return x if layer.residual == "post_norm" else layer.input_layernorm(x)

    def run(self, layer: MQADecoderLayer, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return layer(x, mask, position_embeddings=self.angles)

    def projected(self, attention: MQAAttention, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, rotated: [B, H, T, D] and [B, G, T, D]."""
        query, key = (project(linear, h, attention.qk_head_dim) for linear in (attention.q_proj, attention.k_proj))
        if attention.rotary and self.angles is not None:
            cos, sin = self.angles
            query, key = (rotate(t, cos, sin, attention.head_dim) for t in (query, key))
        return query, key

    def moments(self, teacher: MQADecoderLayer, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x x'] [d + 1, d + 1], and E[x̄ x̄'] [new heads, d, d] of the attention-averaged input of the query heads
        that share each new head."""
        attention, d = teacher.self_attn, self.config.hidden_size
        moment = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=self.device)
        new = self.pooled.num_key_value_heads
        mixed = torch.zeros(new, d, d, dtype=torch.float64, device=self.device)
        count = queries = 0
        T = self.tokens.shape[1]
        for rows in self.rows(0, len(self.tokens) - self.options.held_out):
            h = self.attended(teacher, self.states[rows].to(self.device))
            flat = nn.functional.pad(h.flatten(0, 1).double(), (0, 1), value=1.0)
            moment += flat.mT @ flat
            count += len(flat)
            chosen = torch.randperm(T, generator=self.generator)[: self.options.queries].to(self.device)
            query, key = self.projected(attention, h)
            zero = torch.zeros(len(h), key.shape[1], T, 1, device=self.device)
            rows_of_mask = mask[:, :, chosen]
            _, weights = eager_attention_forward(
                attention, query[:, :, chosen], key, zero, rows_of_mask, attention.scaling
            )
            average = (weights.flatten(1, 2) @ h).view(len(h), new, -1, d).transpose(0, 1).flatten(1, 2)
            average = average.double()
            mixed += average.mT @ average
            queries += average.shape[1]
        moment, mixed = moment / count, mixed / queries
        moment[:-1, :-1] = fitting.shrunk(moment[:-1, :-1])
        return moment, fitting.shrunk(mixed)

    def fit_heads(
        self, attention: MQAAttention, moments: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[Tensors, dict[str, float]]:
        """Projections and biases of the new attention, by name."""
        moment, mixed = moments
        config, pooled = self.config, self.pooled
        H, G, new = config.num_attention_heads, config.num_key_value_heads, pooled.num_key_value_heads
        D, Dv, d = config.qk_head_dim, config.v_head_dim, config.hidden_size
        R = config.rotary_dim if attention.rotary else 0
        width_k, width_v = pooled.qk_head_dim // D, pooled.v_head_dim // Dv

        def augmented(linear: nn.Linear) -> torch.Tensor:
            bias = (
                torch.zeros(linear.out_features, 1, device=self.device)
                if linear.bias is None
                else linear.bias[:, None]
            )
            return torch.cat((linear.weight, bias), dim=1).double()

        w_q = augmented(attention.q_proj).view(H, D, d + 1)
        w_k = augmented(attention.k_proj).view(G, D, d + 1)
        w_v = attention.v_proj.weight.double().view(G, Dv, d)
        w_o = attention.o_proj.weight.double().view(d, H, Dv).transpose(0, 1)
        old_of = torch.arange(H, device=self.device) // (H // G)
        keys, queries, vals, outs = [], [], [], []
        discarded_k = discarded_v = 0.0
        for group in range(new):
            heads = slice(group * G // new, (group + 1) * G // new)
            qs = slice(group * H // new, (group + 1) * H // new)
            head_of = old_of[qs] - heads.start
            parts = []
            if R:
                parts.append(fitting.rotary_keys(w_k[heads, :R], w_q[qs, :R], head_of, moment, width_k))
            if R < D:
                parts.append(fitting.plain_keys(w_k[heads, R:], w_q[qs, R:], head_of, moment, width_k))
            # The rotated components of a block come before its others.
            keys.append(torch.cat([p.w_k.unflatten(0, (width_k, -1)) for p in parts], dim=1).flatten(0, 1))
            queries.append(torch.cat([p.w_q.unflatten(1, (width_k, -1)) for p in parts], dim=2).flatten(1, 2))
            fit_v = fitting.values(w_v[heads], w_o[qs], head_of, mixed[group], width_v)
            vals.append(fit_v.w_v)
            outs.append(fit_v.w_o)
            discarded_k += max(p.discarded for p in parts) / new
            discarded_v += fit_v.discarded / new
        q, k, v = torch.cat(queries).flatten(0, 1), torch.cat(keys), torch.cat(vals)
        o = torch.cat(outs)  # [H, d, M·Dv]
        fitted = {"q_proj.weight": q[:, :-1], "k_proj.weight": k[:, :-1], "v_proj.weight": v}
        fitted["o_proj.weight"] = o.transpose(0, 1).flatten(1)
        if pooled.query_bias:
            fitted["q_proj.bias"] = q[:, -1]
        if pooled.key_bias:
            fitted["k_proj.bias"] = k[:, -1]
        if pooled.output_bias:
            bias = torch.zeros(d, dtype=torch.float64, device=self.device)
            if attention.o_proj.bias is not None:
                bias += attention.o_proj.bias.double()
            if attention.v_proj.bias is not None:  # attention weights add up to 1
                bias += torch.einsum("hdv,hv->d", w_o, attention.v_proj.bias.double().view(G, Dv)[old_of])
            fitted["o_proj.bias"] = bias
        return fitted, {"discarded_key_energy": discarded_k, "discarded_value_energy": discarded_v}

    def heads_output(
        self, layer: MQADecoderLayer, h: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of a layer's heads side by side [B, T, H·Dv], and of its attention [B, T, d]."""
        seen: list[torch.Tensor] = []
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        output, _ = layer.self_attn(h, position_embeddings=self.angles, attention_mask=mask)
        hook.remove()
        return seen[0], output

    def refit(self, teacher: MQADecoderLayer, student: MQADecoderLayer, mask: torch.Tensor) -> None:
        """Refit the student's output projection (and bias, where it has one) to the teacher's attention output."""
        projection = student.self_attn.o_proj
        r, d = projection.in_features, projection.out_features
        biased = projection.bias is not None
        zz = torch.zeros(r + 1, r + 1, dtype=torch.float64, device=self.device)
        yz = torch.zeros(d, r + 1, dtype=torch.float64, device=self.device)
        for rows in self.rows(0, len(self.tokens) - self.options.held_out):
            h = self.attended(teacher, self.states[rows].to(self.device))
            z, _ = self.heads_output(student, h, mask)
            _, y = self.heads_output(teacher, h, mask)
            z = nn.functional.pad(z.flatten(0, 1).double(), (0, 1), value=1.0)
            zz += z.mT @ z
            yz += y.flatten(0, 1).double().mT @ z
        n = zz[-1, -1]
        zz, yz = zz / n, yz / n
        mean_z, mean_y = zz[:-1, -1], yz[:, -1]
        zz, yz = zz[:-1, :-1], yz[:, :-1]
        if biased:  # a bias takes the means
            zz, yz = zz - torch.outer(mean_z, mean_z), yz - torch.outer(mean_y, mean_z)
        weight = fitting.refit(zz, yz, projection.weight.double())
        projection.weight.data.copy_(weight)
        if biased:
            projection.bias.data.copy_(mean_y - weight @ mean_z)

    def compare(self, teacher: MQADecoderLayer, student: MQADecoderLayer, mask: torch.Tensor) -> dict[str, float]:
        """Relative error of the attention's output on the held-out tokens."""
        distance = size = 0.0
        for rows in self.rows(len(self.tokens) - self.options.held_out, len(self.tokens)):
            h = self.attended(teacher, self.states[rows].to(self.device))
            expected = self.heads_output(teacher, h, mask)[1]
            distance += float((self.heads_output(student, h, mask)[1] - expected).double().square().sum())
            size += float(expected.double().square().sum())
        return {"attention_error": (distance / size) ** 0.5 if size else 0.0}

    def advance(self, teacher: MQADecoderLayer, student: MQADecoderLayer, mask: torch.Tensor) -> None:
        for rows in self.rows(0, len(self.tokens)):
            self.states[rows] = self.run(student, self.states[rows].to(self.device), mask).cpu()
        for rows in self.rows(0, len(self.teacher_states)):
            self.teacher_states[rows] = self.run(teacher, self.teacher_states[rows].to(self.device), mask).cpu()

    # -- the whole ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean cross-entropy in nats on the held-out tokens, before and after."""
        held = self.tokens[-self.options.held_out :].to(self.device)
        result: dict[str, Any] = {}
        for name, states in (("before", self.teacher_states), ("after", self.states[-self.options.held_out :])):
            total = 0.0
            for i, x in enumerate(states):
                logits = self.head(self.shell.leave(x[None].to(self.device)))[0, :-1] * self.config.logit_scale
                total += float(nn.functional.cross_entropy(logits.float(), held[i, 1:]))
            result[name] = total / len(states)
        return result


def fitted_config(pooled: MQAConfig, width: int) -> MQAConfig:
    """The configuration of fitted heads: `width` times as wide, the bias of values folded into that of the output."""
    fitted = copy.deepcopy(pooled)
    fitted.qk_head_dim, fitted.v_head_dim = width * pooled.qk_head_dim, width * pooled.v_head_dim
    fitted.value_bias, fitted.output_bias = False, pooled.value_bias or pooled.output_bias
    return fitted

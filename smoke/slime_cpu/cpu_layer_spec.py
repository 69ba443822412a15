"""Megatron layers in plain torch, for slime's `--spec cpu_layer_spec layer_spec`.

slime's Hugging Face loader and saver know TransformerEngine's parameter names, where a norm belongs to the linear
layer after it, and slime always packs sequences (THD); Megatron's own local layers have neither. And without
TransformerEngine, in float32, Megatron's optimizer saves checkpoints that it cannot load.
"""

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch.nn.functional import rms_norm, scaled_dot_product_attention


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and the linear layer after it, with TransformerEngine's name for the norm's weight."""

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.epsilon = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor, *args, **kwargs):
        return super().forward(rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.epsilon), *args, **kwargs)


class PackedAttention(DotProductAttention):
    """Causal attention inside each packed sequence: query [t, heads, d], key and value [t, groups, d]."""

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None, **_):
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        outputs = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)


def layer_spec(args, config, vp_stage):
    """The spec slime's model_provider asks for."""
    spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = NormColumnParallelLinear
    layer.self_attention.submodules.core_attention = PackedAttention
    layer.mlp.submodules.linear_fc1 = NormColumnParallelLinear
    return spec


_state_dict = DistributedOptimizer.state_dict
_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _state_dict_with_a_state(self):
    """Also before the first step, for the place into which a checkpoint is loaded; it replaces what this step does."""
    if not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return _state_dict(self)


def _set_states_but_the_step(self, model_param, tensors):
    """PyTorch's Adam counts steps for each parameter; the checkpoint has one count, which is loaded by then."""
    group, index = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
    _set_states(self, model_param, {"step": state["step"].clone(), **tensors})


DistributedOptimizer.state_dict = _state_dict_with_a_state
DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_but_the_step
# In float32 the optimizer's parameters are views of the model's, which autograd guards.
DistributedOptimizer.load_state_dict = torch.no_grad()(DistributedOptimizer.load_state_dict)

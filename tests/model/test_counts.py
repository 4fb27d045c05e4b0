"""Counts against published figures, formulas written out by hand, and what autograd and the optimizer really keep."""

from pretrain.config.rules import Layout
from pretrain.config.schema import ModelConfig
from pretrain.model.counts import (
    count_flops,
    count_parameters,
    part,
    tokens_per_expert,
)
from pretrain.model.logical import logical_tensors
from pretrain.plan.memory import rank_memory
from tests.helpers.configs import DENSE, MOE, make_config
from tests.helpers.distributed import run_ranks

# 3 dense-first layers' worth of everything the model can have, odd sizes throughout.
EVERYTHING = ModelConfig(
    vocab_size=101,
    hidden_size=24,
    num_layers=5,
    num_attention_heads=6,
    num_query_groups=3,
    head_dim=10,
    ffn_size=70,
    qk_norm=True,
    num_experts=6,
    top_k=2,
    expert_ffn_size=14,
    shared_expert_ffn_size=22,
    first_dense_layers=2,
)


def test_parts_by_hand():
    D, H, G, C, E = 24, 6, 3, 10, 6
    expected = {
        "embedding": 101 * D,
        "attention": 5 * (D * (H + 2 * G) * C + H * C * D),
        "dense_ffn": 2 * 3 * D * 70,
        "routed_experts": 3 * E * 3 * D * 14,
        "shared_experts": 3 * 3 * D * 22,
        "router": 3 * E * D,
        "norms": 5 * (2 * D + 2 * C) + D,
        "output": 101 * D,
    }
    counts = count_parameters(EVERYTHING)
    assert counts.by_part == expected
    assert counts.total == sum(expected.values())
    assert counts.active == counts.total - expected["routed_experts"] * 4 // 6
    assert counts.non_embedding == counts.total - 2 * 101 * D - expected["norms"]
    assert counts.active_non_embedding == counts.non_embedding - expected["routed_experts"] * 4 // 6


def test_tied_table_is_one_table_and_bias_no_parameter():
    counts = count_parameters(EVERYTHING)
    tied = count_parameters(EVERYTHING.model_copy(update={"tie_embeddings": True}))
    assert counts.total - tied.total == 101 * 24
    router = EVERYTHING.router.model_copy(update={"score_function": "sigmoid", "bias_update_rate": 0.1})
    biased = EVERYTHING.model_copy(update={"router": router})
    assert len(list(logical_tensors(biased))) > len(list(logical_tensors(EVERYTHING)))
    assert count_parameters(biased) == counts


def test_every_trained_tensor_has_a_part():
    for tensor in logical_tensors(EVERYTHING):
        assert part(tensor) in count_parameters(EVERYTHING).by_part


def test_transformers_qwen3_moe_has_as_many_parameters():
    """An oracle written elsewhere: the same shape in Hugging Face transformers."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    ours = EVERYTHING.model_copy(update={"first_dense_layers": 0, "ffn_size": 0, "shared_expert_ffn_size": 0})
    config = Qwen3MoeConfig(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=14,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        theirs = Qwen3MoeForCausalLM(config)
    assert count_parameters(ours).total == sum(p.numel() for p in theirs.parameters())


def test_flops_by_hand():
    S = 16
    D, H, G, C = 24, 6, 3, 10
    per_layer = D * (H + 2 * G) * C + H * C * D
    dense = 3 * D * 70
    moe = 2 * 3 * D * 14 + 3 * D * 22 + 6 * D
    multiply_adds = 5 * per_layer + 2 * dense + 3 * moe + 101 * D
    square = 5 * (S * H * C + S * H * C)  # scores, then their product with the values
    flops = count_flops(EVERYTHING, S)
    assert flops.per_token_full_attention == 3 * 2 * (multiply_adds + square)
    assert flops.per_token == 3 * 2 * multiply_adds + 3 * 2 * square // 2
    assert flops.per_token_6nd == 6 * count_parameters(EVERYTHING).active
    # A tied table still multiplies at the output.
    assert count_flops(EVERYTHING.model_copy(update={"tie_embeddings": True}), S).per_token == flops.per_token


def test_flops_against_torch_counter():
    """Forward and backward of a dense model in transformers, counted by torch itself."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    S = 32
    ours = make_config(DENSE, {"model.qk_norm": True, "model.head_dim": 8}).model
    config = Qwen3Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.query_groups,
        head_dim=ours.channels,
        intermediate_size=ours.ffn_size,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config)
    tokens = torch.zeros(1, S, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    assert counter.get_total_flops() == count_flops(ours, S).per_token_full_attention * S


def test_tokens_per_expert():
    assert tokens_per_expert(EVERYTHING, 300) == 100
    assert tokens_per_expert(make_config(DENSE).model, 300) == 0


def memory(start, changes=None, world_size=1):
    config = make_config(start, changes)
    return rank_memory(config, Layout.of(config, world_size))


def test_weights_gradients_and_states_of_one_rank():
    n = count_parameters(make_config(MOE).model).total
    fp32 = memory(MOE)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * n, 4 * n, 8 * n)
    bf16 = memory(MOE, {"run.precision": "bf16"})
    assert (bf16.weights, bf16.gradients, bf16.optimizer) == (2 * n, 4 * n, 12 * n)
    parts = count_parameters(make_config(MOE).model).by_part
    matrices = parts["attention"] + parts["routed_experts"]
    assert memory(MOE, {"optim.kind": "muon"}).optimizer == 8 * n - 4 * matrices
    muon_router = memory(MOE, {"optim.kind": "muon", "optim.routes": {"*.router.weight": "muon"}})
    assert muon_router.optimizer == 8 * n - 4 * (matrices + parts["router"])


def test_sharded_weights_by_hand():
    parts = count_parameters(make_config(MOE).model).by_part
    cut = memory(MOE, {"parallel.tensor": 2, "parallel.expert": 4, "parallel.expert_tensor": 2}, 8)
    split = (parts["embedding"] + parts["attention"] + parts["output"]) // 2
    assert cut.weights == 4 * (split + parts["router"] + parts["norms"] + parts["routed_experts"] // 8)


def test_largest_pipeline_rank_holds_embedding_or_output():
    changes = {"parallel.pipeline": 2, "model.vocab_size": 4096}
    stage = memory(MOE, changes, 2)
    parts = count_parameters(make_config(MOE, changes).model).by_part
    layers = parts["attention"] + parts["router"] + parts["routed_experts"] + parts["norms"] - 32
    assert stage.pipeline_rank == 1  # which has the logits
    assert stage.logits == 32 * 4096 * (4 + 4)
    assert stage.weights == 4 * (layers // 2 + 32 + parts["output"])
    # A tied table has a copy beside the loss.
    assert memory(MOE, {**changes, "model.tie_embeddings": True}, 2).weights == stage.weights


def test_in_flight_microbatches_after_korthikanti():
    """arXiv 2205.05198: the first stage of 1F1B holds P micro-batches, that is all L layers' worth whatever P is;
    interleaving with v chunks makes it L (1 + (P - 1) / (P v))."""
    # Logits aside, the first rank is the largest: a vocabulary of few rows.
    start = {**MOE, "model": {**MOE["model"], "vocab_size": 2}, "batch": {**MOE["batch"], "global_batch_size": 64}}
    alone = memory(start).activations
    piped = memory(start, {"parallel.pipeline": 4}, 4)
    assert piped.pipeline_rank == 0
    assert piped.activations == alone
    interleaved = memory(start, {"parallel.pipeline": 2, "parallel.pipeline_chunks": 2}, 2)
    assert interleaved.activations == alone * (1 + (2 - 1) / (2 * 2))
    few = memory(start, {"parallel.pipeline": 4, "batch.global_batch_size": 2}, 4)
    assert few.activations == alone / 2


def test_recomputation_keeps_less():
    none, selective, full = (
        memory(MOE, {"parallel.recompute": mode, "run.precision": "bf16", "model.num_layers": 16}).activations
        for mode in ("none", "selective", "full")
    )
    assert none > selective > full
    # One layer's input each, and one layer in full while its backward pass runs.
    tokens, D = 32, 32
    assert full == tokens * 16 * D * 2 + none // 16


def test_data_parallel_share_is_that_of_the_optimizer():
    """AdamW state on the rank that owns the most, by the optimizer's own assignment."""
    from pretrain.optim.ownership import Load, assign_owners

    for ranks in (2, 3, 5):
        config = make_config(MOE, {"batch.global_batch_size": 30})
        loads = {True: [], False: []}
        for tensor in logical_tensors(config.model):
            loads[tensor.is_expert].append(8 * tensor.numel)
        largest = 0
        for sizes in loads.values():
            shares = [0] * ranks
            for size, owner in zip(sizes, assign_owners([Load(0, s) for s in sizes], ranks), strict=True):
                shares[owner] += size
            largest += max(shares)
        assert rank_memory(config, Layout.of(config, ranks)).optimizer == largest
        assert largest < 8 * count_parameters(config.model).total  # sharding does something


# What autograd keeps in the native model, by what is varied: (start, smaller, larger).
GROWING = {
    "dense ffn": (DENSE, {}, {"model.ffn_size": 128}),
    "expert ffn": (MOE, {}, {"model.expert_ffn_size": 48}),
    "shared expert ffn": (MOE, {"model.shared_expert_ffn_size": 16}, {"model.shared_expert_ffn_size": 80}),
    "heads": (DENSE, {"model.head_dim": 16}, {"model.head_dim": 16, "model.num_attention_heads": 12}),
    "groups": (
        DENSE,
        {"model.head_dim": 16, "model.num_attention_heads": 12},
        {"model.head_dim": 16, "model.num_attention_heads": 12, "model.num_query_groups": 6},
    ),
}


def saved_bytes():
    """Bytes that autograd keeps of a forward pass, per entry of GROWING, for the smaller and the larger model."""
    import torch

    from pretrain.model import attention
    from pretrain.parallel.engine import build_engine
    from pretrain.parallel.mesh import build_mesh
    from pretrain.platform import cpu_adapter

    cpu_adapter.apply()
    attention.CPU_PLAIN_UP_TO = 0  # The attention that is counted keeps no scores.
    mesh = None
    results = {}
    for name, (start, *pair) in GROWING.items():
        for changes in pair:
            config = make_config(start, {"parallel.overlap_grad_reduce": False, **changes})
            mesh = mesh or build_mesh(config.parallel, torch.device("cpu"))
            (chunk,) = build_engine(config, mesh).chunks
            weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
            kept = {}

            def pack(tensor, kept=kept, weights=weights):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    kept[storage.data_ptr()] = storage  # held, so that no address is used twice
                return tensor

            tokens = torch.zeros(1, config.batch.sequence_length, dtype=torch.long)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                chunk(tokens, torch.arange(tokens.shape[1])[None], None, labels=tokens)
            results.setdefault(name, []).append(sum(storage.nbytes() for storage in kept.values()))
    return results


def test_activation_estimate_grows_as_what_autograd_keeps():
    """Differences, because torch's RMSNorm keeps more on a CPU than the fused one that is counted."""
    (measured,) = run_ranks(saved_bytes, 1)
    for name, (start, smaller, larger) in GROWING.items():
        estimate = memory(start, larger).activations - memory(start, smaller).activations
        kept = measured[name][1] - measured[name][0]
        assert estimate == kept > 0, name

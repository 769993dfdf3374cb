"""How much faster tuning and ranking are when only the read positions are computed, on any device.

    python benchmarks/ranking_speed.py --hidden_size 4096 --num_layers 32 --output results.json

Both sides run in one process on the same random-weight Llama and prompts: ours computes the LM head at the answer's
positions (training) or the last one (ranking); the peer is the model's plain forward over all positions, as
`transformers` does by itself. Prints rows a second, their ratio and the peak memory.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=33_024, help="Llama-2's with 1,024 user tokens")
    parser.add_argument("--length", type=int, default=600, help="tokens a prompt")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="JSON file for the figures")
    return parser


def rows_per_second(step, batch_size: int, repeats: int, device: torch.device) -> tuple[float, float]:
    """The median speed of `step` in rows a second, and the peak memory in GiB (NaN on a CPU)."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats + 1):  # the first is a warm-up
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return batch_size / sorted(times[1:])[repeats // 2], peak


def main() -> None:
    args = make_parser().parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.num_layers, num_attention_heads=max(1, args.hidden_size // 128), use_cache=False,
        num_key_value_heads=max(1, args.hidden_size // 128), max_position_embeddings=4096,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16 if device.type != "cpu" else torch.float32)
    from peft import LoraConfig, get_peft_model

    rows = list(range(args.vocab_size - 1024, args.vocab_size))
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    lora.trainable_token_indices = {"embed_tokens": rows, "lm_head": rows}
    model = get_peft_model(model, lora)
    ids = torch.randint(args.vocab_size, (args.batch_size, args.length), device=device)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]

    def train(keep: int | None) -> None:
        kept = {"labels": labels} if keep is None else {"labels": labels[:, -keep:], "logits_to_keep": keep}
        model(input_ids=ids, **kept).loss.backward()
        model.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def rank(keep: int) -> None:
        model(input_ids=ids, logits_to_keep=keep).logits[:, -1, :20].float().cpu()

    results = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "settings": vars(args)}
    results["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(f"{results['device']}, {results['parameters']:,} parameters, prompts of {args.length} tokens")
    print(f"{'':8}{'ours rows/s':>14}{'plain rows/s':>14}{'ratio':>8}{'ours GiB':>10}{'plain GiB':>11}")
    for name, ours, plain in (
        ("train", lambda: train(3), lambda: train(None)),
        ("rank", lambda: rank(1), lambda: rank(0)),
    ):
        model.train(name == "train")
        speed, memory = rows_per_second(ours, args.batch_size, args.repeats, device)
        plain_speed, plain_memory = rows_per_second(plain, args.batch_size, args.repeats, device)
        results[name] = {"ours": speed, "plain": plain_speed, "ratio": speed / plain_speed}
        results[name] |= {"ours_gib": memory, "plain_gib": plain_memory}
        print(f"{name:8}{speed:14.1f}{plain_speed:14.1f}{speed / plain_speed:8.2f}{memory:10.1f}{plain_memory:11.1f}")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()

"""A trajectory as a person reads it: who said what, which tokens are trained, what each turn costs in KL."""

from typing import Any

from examples.tcod.metrics import token_kl


def to_show(samples: list[Any]) -> Any:
    """The one to keep for reading: a short one that was won, if there is any."""
    return min(samples, key=lambda sample: (-sample.reward, len(sample.tokens)))


def transcript(sample: Any, tokenizer: Any) -> str:
    """Text of one finished sample.

    The prompt comes first, replayed turns included. Then every span of the response: "student" spans are sampled and
    trained, with their number of tokens and KL in nats (log student - log teacher, summed); "context" spans are not.
    """
    record = sample.metadata["tcod"]
    prompt_length = len(sample.tokens) - sample.response_length
    response = sample.tokens[prompt_length:]
    kl = token_kl(sample)
    lines = [
        f"rollout {record['n']}, depth k = {record['k']}: {record['replayed']} turns replayed, "
        f"{len(record['turns'])} of at most {record['budget']} played, {'won' if record['won'] else 'not won'}",
        f"--- prompt, {prompt_length} tokens, not trained",
        tokenizer.decode(sample.tokens[:prompt_length]),
    ]
    at = 0
    for turn in record["turns"]:
        if at < turn["start"]:
            lines += [
                f"--- context, {turn['start'] - at} tokens, not trained",
                tokenizer.decode(response[at : turn["start"]]),
            ]
        at = turn["end"]
        lines += [
            f"--- student, turn {turn['turn'] + 1}, {at - turn['start']} tokens trained, "
            f"KL {sum(kl[turn['start']:at]):+.2f} nats{'' if turn['valid'] else ', invalid action'}",
            tokenizer.decode(response[turn["start"] : at]),
        ]
    if at < len(response):
        lines += [f"--- context, {len(response) - at} tokens, not trained", tokenizer.decode(response[at:])]
    trained = sum(sample.loss_mask)
    lines.append(f"--- {trained} of {len(response)} response tokens trained, trajectory KL {sum(kl):+.2f} nats")
    return "\n".join(lines) + "\n"

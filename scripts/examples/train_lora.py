"""An adapter teaches a model a habit: answers that end in "my dear."  The picture is the loss on rows it never saw.

Run: python scripts/examples/train_lora.py --output lora.svg
"""

from picture import bars, options

import llmjax

ANIMALS = "cat dog horse cow sheep goat hen duck goose pig fox wolf bear hare mouse owl".split()
SOUNDS = (
    "meows barks neighs moos bleats cries clucks quacks honks grunts yelps howls growls squeals squeaks hoots".split()
)


def main(argv: list[str] | None = None) -> list[float]:
    """The loss on the held-out rows, before the first step and after each evaluation."""
    parser = options(__doc__, "lora.svg")
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args(argv)

    model = llmjax.load(args.model)
    rows = [{"prompt": f"What does a {animal} do? A {animal}", "completion": f" {sound}, my dear."}
            for animal, sound in zip(ANIMALS, SOUNDS, strict=True)]  # fmt: skip
    config = llmjax.TrainConfig(rank=4, learning_rate=5e-3, steps=args.steps, eval_every=args.steps // 6 or 1)
    result = llmjax.finetune(model, rows[:12], config, eval_rows=rows[12:])

    losses = [result.first_eval, *(m["eval_loss"] for m in result.metrics if "eval_loss" in m)]
    steps = [0, *(m["step"] for m in result.metrics if "eval_loss" in m)]
    bars(args.output, "Loss on rows that were not learned from", losses, [f"step {i}" for i in steps])
    for name, tuned in (("before", model), ("after", result.model)):
        llm = llmjax.LLM(tuned, numerics="fast", max_batch=1)
        answer = llm.generate(rows[-1]["prompt"], {"temperature": 0, "max_tokens": 12})[0].outputs[0].text
        print(f"{name}: {rows[-1]['prompt']}{answer!r}")
    return losses


if __name__ == "__main__":
    main()

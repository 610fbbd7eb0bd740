"""A process of vLLM: `python vllm_process.py CHECKPOINT REQUEST ANSWERS`, with files of JSON.

The request holds `engine`, options of `vllm.LLM`; `rounds`, lists of prompts of token ids, answered one after the
other; and `new`, the number of new tokens of each prompt. The answers are lists of token ids, and counts.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    checkpoint, request, answers = map(Path, sys.argv[1:])
    asked = json.loads(request.read_text())
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 128, "enforce_eager": True}
    llm = LLM(str(checkpoint), skip_tokenizer_init=True, disable_log_stats=False, **options | asked["engine"])
    rounds, cached = [], 0
    for prompts in asked["rounds"]:
        sampling = [
            SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for new in asked["new"]
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        rounds.append([list(output.outputs[0].token_ids) for output in outputs])
        cached += sum(output.num_cached_tokens or 0 for output in outputs)
    metrics: list[Any] = llm.get_metrics()
    accepted = sum(metric.value for metric in metrics if metric.name == "vllm:spec_decode_num_accepted_tokens")
    answers.write_text(json.dumps({"rounds": rounds, "cached": cached, "accepted": accepted}))


if __name__ == "__main__":
    main()

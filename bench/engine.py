"""The expanded model in another engine: CTranslate2 converts the plain checkpoint and generates the tokens that transformers generates.

Needs `pip install ctranslate2`; adept_fast is not imported by what converts and generates.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import parser

PROMPTS = ("The capital of France is", "def fibonacci(n):")
ELSEWHERE = """
import json, sys
sys.modules["adept_fast"] = None  # importing it raises
import ctranslate2, torch, transformers
from ctranslate2.converters import TransformersConverter
source, converted, tokens, prompts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
TransformersConverter(source).convert(converted)
tokenizer = transformers.AutoTokenizer.from_pretrained(source)
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
engine = ctranslate2.Generator(converted, device="cpu", compute_type="float32")
result = []
for prompt in prompts:
    ids = tokenizer(prompt)["input_ids"]
    start = [tokenizer.convert_ids_to_tokens(ids)]
    theirs = engine.generate_batch(start, max_length=tokens, sampling_topk=1, include_prompt_in_result=False)[0].sequences_ids[0]
    ours = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids):].tolist()
    if ours and ours[-1] == model.generation_config.eos_token_id:
        ours.pop()  # the engine leaves the end out
    result.append({"prompt": prompt, "tokens": len(ours), "same": ours == theirs, "text": tokenizer.decode(ours)})
print(json.dumps({"ctranslate2": ctranslate2.__version__, "transformers": transformers.__version__, "prompts": result}))
"""


def main(argv: list[str]) -> dict[str, Any]:
    """Arguments -> versions and, per prompt, whether the greedy tokens agree. Raises where they do not."""
    options = parser("engine", __doc__)
    options.add_argument("--model", help="a checkpoint folder or hub name that CTranslate2 knows (Llama and others)")
    options.add_argument("--layers", type=int, nargs="+", default=[3, 9, 14, 27], help="that are copied")
    options.add_argument("--tokens", type=int, default=40, help="to generate after each prompt")
    given = options.parse_args(argv)
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        return {"skipped": "ctranslate2 is not installed: pip install ctranslate2"}
    if not given.model:
        return {"skipped": "no --model given"}
    from adept_fast import expand_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        expanded, converted = Path(temporary) / "expanded", Path(temporary) / "converted"
        expand_checkpoint(given.model, expanded, given.layers)
        arguments = [sys.executable, "-c", ELSEWHERE, str(expanded), str(converted), str(given.tokens), json.dumps(PROMPTS)]
        done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    if not all(prompt["same"] for prompt in result["prompts"]):
        raise RuntimeError(f"other tokens than transformers generates: {result}")
    return {"model": given.model, "layers": given.layers, **result}

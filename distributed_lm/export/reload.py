"""Run by path in a fresh process: load an exported folder as any user would, and compare.

``python -I reload.py FOLDER WORK``: WORK holds tokens and expected logits (``ours.safetensors``), a
text and its expected ids (``text.json``), and gets the answer (``theirs.json``).
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    # Neither this package nor the engines: importing one of them is an error from here on.
    for name in ("distributed_lm", "megatron", "deepspeed"):
        sys.modules[name] = None  # type: ignore[assignment]
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    # Nothing from the network, and the folder's code not into the user's cache.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(work / "modules")

    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = any(folder.glob("modeling_*.py"))
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise SystemExit(f"{kind}: {sorted(map(str, report[kind]))[:3]}")
    model = model.float().eval()
    ours = load_file(work / "ours.safetensors")
    lengths = sorted(int(name.split("_")[1]) for name in ours if name.startswith("tokens_"))
    differences, largest = {}, 0.0
    with torch.no_grad():
        for length in lengths:
            expected = ours[f"logits_{length}"]
            found = model(ours[f"tokens_{length}"], use_cache=False).logits
            differences[str(length)] = (found - expected).abs().max().item()
            largest = max(largest, expected.abs().max().item())
    text = json.loads((work / "text.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    plain = tokenizer(text["text"], add_special_tokens=False).input_ids
    result = {
        "differences": differences,
        "largest_logit": largest,
        "same_tokens": plain == text["ids"],
        "adds_tokens": tokenizer(text["text"]).input_ids != plain,
        "transformers_version": transformers.__version__,
    }
    (work / "theirs.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

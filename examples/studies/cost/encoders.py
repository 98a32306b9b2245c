"""What does an encoder cost, which `features=` runs once in a run?

    python examples/studies/cost/encoders.py          # minutes; needs timm and transformers, and downloads nothing
    python examples/studies/cost/encoders.py --quick  # shows that it runs; ignore its times

Weights are random, which takes as long as pretrained ones. The fastest of five passes of 16 samples counts, in CPU time
of the first thread, which has its share of what threads do together: what else runs on the machine hardly changes it.
"""

import argparse
import os
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # a thread that waits uses no CPU time

import pandas as pd
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lightning_sensitivity.reading.inputs import encode
from lightning_sensitivity.running.call import ModelCall

IMAGES = {
    "EfficientNet-Lite0": ("tf_efficientnet_lite0", (96, 224)),
    "ResNet-50": ("resnet50", (96, 224)),
    "DINOv2 small": ("vit_small_patch14_dinov2", (98, 224)),
    "CLIP ViT-B/32": ("vit_base_patch32_clip_224", (224,)),
}
TEXTS = {"MiniLM-L6": (6, 384, 12), "BERT base": (12, 768, 12)}  # layers, width, heads
WORDS = 64  # tokens of a text
PART = 16  # samples of a pass


def image_encoder(name: str, side: int) -> nn.Module:
    options = {"img_size": side} if name.startswith("vit") else {}
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


def text_encoder(layers: int, width: int, heads: int) -> nn.Module:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return BertModel(BertConfig(**sizes, intermediate_size=4 * width))


def seconds(encoder: nn.Module, call: ModelCall, threads: int, passes: int) -> float:
    """Return the seconds of a sample, in the fastest pass."""
    torch.set_num_threads(threads)
    times = []
    for _ in range(passes):
        start = time.thread_time()
        encode(encoder, call, call.size, None)
        times.append(time.thread_time() - start)
    return min(times) / call.size


def main() -> None:
    parser = argparse.ArgumentParser(description="Time encoders on one and two threads.")
    parser.add_argument("--quick", action="store_true", help="one encoder of each kind, one pass")
    parser.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    cases = [(name, f"{side} pixels") for name, (_, sides) in IMAGES.items() for side in sides]
    cases += [(name, f"{WORDS} tokens") for name in TEXTS]
    if args.quick:
        cases, args.passes = [cases[0], cases[-2]], 1
    rows = []
    for name, size in cases:
        number = int(size.split()[0])
        if name in IMAGES:
            encoder = image_encoder(IMAGES[name][0], number)
            batch: object = torch.rand(PART, 3, number, number)
        else:
            encoder = text_encoder(*TEXTS[name])
            ids = torch.randint(1000, 30_000, (PART, number))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for threads in (1, 2):
            found = seconds(encoder, ModelCall(encoder, batch), threads, args.passes)
            rows.append({"encoder": name, "size": size, "threads": threads, "seconds": round(found, 6)})
            print(*rows[-1].values(), flush=True)
    if not args.quick:
        pd.DataFrame(rows).to_csv(Path(__file__).with_name("encoders.csv"), index=False)


if __name__ == "__main__":
    main()

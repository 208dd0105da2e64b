"""Use an exported .tflite without mobilevit or PyTorch. Needs: pip install ai-edge-litert numpy pillow.

python examples/litert_runtime.py best.tflite image.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image, ImageOps

path, file = sys.argv[1:]
card = json.loads(Path(path + ".json").read_text(encoding="utf-8"))  # classes, sizes, scaling
how, image = card["preprocessing"], ImageOps.exif_transpose(Image.open(file)).convert("RGB")
(height, width), box = how["size"], (0, 0, image.width, image.height)
filled = (width, height)
if how["resize_mode"] == "crop":  # the center of the image, with the aspect ratio of the input
    scale = min(image.width / width, image.height / height) * how["crop_fraction"]
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + width * scale, image.width), min(top + height * scale, image.height))
elif how["resize_mode"] == "pad":  # the whole image, padded with black at the right and bottom
    scale = min(width / image.width, height / image.height)
    filled = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
pixels = np.zeros((1, height, width, 3), np.uint8)
pixels[0, : filled[1], : filled[0]] = image.resize(filled, Image.Resampling[how["interpolation"].upper()], box)
if not card["baked"]:  # otherwise scaling is inside the model
    pixels = ((pixels / 255 - how["mean"]) / how["std"]).astype(np.float32).transpose(0, 3, 1, 2)

model = Interpreter(path)
model.allocate_tensors()
model.set_tensor(model.get_input_details()[0]["index"], pixels)
model.invoke()
found = sorted(model.get_output_details(), key=lambda output: output["name"])
outputs = dict(zip(card["outputs"], [model.get_tensor(output["index"]) for output in found], strict=True))

if card["task"] == "classification":
    odds = np.exp(outputs["logits"][0] - outputs["logits"][0].max())
    answer = {card["classes"][i]: round(float(odds[i] / odds.sum()), 6) for i in odds.argsort()[:-4:-1]}
elif card["task"] == "detection":  # boxes in 0..1 of the input; without NMS, several per object
    scores, threshold = outputs["scores"][0], card["score_threshold"] or 0.3
    found = zip(*np.nonzero(scores > threshold), strict=True)
    answer = [
        [card["classes"][k], round(float(scores[a, k]), 4), outputs["boxes_xyxy"][0, a].tolist()] for a, k in found
    ]
else:
    labels = outputs["label_map"][0] if "label_map" in outputs else outputs["logits"][0].argmax(0)
    answer = {card["classes"][k]: round(float((labels == k).mean()), 6) for k in np.unique(labels)}
print(json.dumps(answer))

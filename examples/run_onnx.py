"""Segment a picture with an exported network: numpy, OpenCV and onnxruntime alone.

python examples/run_onnx.py slim.onnx street.jpg overlay.png
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime

model, picture, out = sys.argv[1:4]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["sparse_seg"])
height, width = about["size"]

image = cv2.imread(picture)
if image is None:
    sys.exit(f"{picture} is no picture that OpenCV reads")
image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
rgb = image[:, :, ::-1][None]
if about["input"] == "float":
    rgb = (rgb.transpose(0, 3, 1, 2) / 255).astype(np.float32)
outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": rgb}), strict=True))

classes = outputs["classes"][0]
palette = np.array(about["colours"] or np.random.default_rng(0).integers(0, 256, (256, 3)), np.uint8)
overlay = cv2.addWeighted(image, 0.5, np.ascontiguousarray(palette[classes][:, :, ::-1]), 0.5, 0)
if "fine_blocks" in outputs:  # a frame around each fine block
    side = about["strides"][-1]
    for y, x in np.argwhere(outputs["fine_blocks"][0]):
        corner = (int(x) * side, int(y) * side)
        cv2.rectangle(overlay, corner, (corner[0] + side - 1, corner[1] + side - 1), (255, 255, 255))
cv2.imwrite(out, overlay)
share = np.bincount(classes.ravel(), minlength=len(about["names"])) / classes.size
print(", ".join(f"{about['names'][k]} {100 * share[k]:.0f} %" for k in np.argsort(-share)[:5] if share[k]))

"""Segment a picture with an exported network: numpy, OpenCV and onnxruntime alone. The picture is scaled to
the network's size, and what it finds back to the picture's own.

python examples/run_onnx.py slim.onnx street.jpg overlay.png
"""

import json
import os
import sys

import cv2
import numpy as np
import onnxruntime

if len(sys.argv) != 4:
    print("usage: python run_onnx.py NETWORK.onnx PICTURE OVERLAY", file=sys.stderr)
    sys.exit(2)
model, picture, out = sys.argv[1:]
if missing := [file for file in (model, picture) if not os.path.exists(file)]:
    sys.exit(f"{missing[0]} does not exist")
if os.path.exists(out) and any(os.path.samefile(file, out) for file in (model, picture)):
    sys.exit(f"{out} is an input and would be overwritten; name another file")
try:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["sparse_seg"])
except Exception as error:  # onnxruntime's errors share no base
    sys.exit(f"{model} is no network that sparse-seg export wrote ({' '.join(str(error).split())[:200]})")
if len(session.get_inputs()) > 1:
    sys.exit(f"{model} wants to be told its fine blocks; export it with a mask policy other than given")
height, width = about["size"]

image = cv2.imread(picture)
if image is None:
    sys.exit(f"{picture} is no picture that OpenCV reads")
seen = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
rgb = seen[:, :, ::-1][None].repeat(about["batch"], 0)  # one picture in all places of the batch
if about["input"] == "float":
    rgb = (rgb.transpose(0, 3, 1, 2) / 255).astype(np.float32)
outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": rgb}), strict=True))

own_size = image.shape[1::-1]
classes = cv2.resize(outputs["classes"][0], own_size, interpolation=cv2.INTER_NEAREST)
palette = np.array(about["colours"] or np.random.default_rng(0).integers(0, 256, (256, 3)), np.uint8)
overlay = cv2.addWeighted(image, 0.5, np.ascontiguousarray(palette[classes][:, :, ::-1]), 0.5, 0)
if "fine_blocks" in outputs:  # a thin line around what is fine, which stays visible
    side = about["strides"][-1]
    fine = np.kron(outputs["fine_blocks"][0], np.ones((side, side), np.uint8))[:height, :width]
    fine = cv2.resize(fine, own_size, interpolation=cv2.INTER_NEAREST)
    overlay[fine > cv2.erode(fine, np.ones((3, 3), np.uint8))] = 255
try:
    written = cv2.imwrite(out, overlay)
except cv2.error:  # a suffix that it does not know
    written = False
if not written:
    sys.exit(f"{out} cannot be written; name a .png or .jpg file in a folder that exists")
share = np.bincount(classes.ravel(), minlength=len(about["names"])) / classes.size
found = ", ".join(f"{about['names'][k]} {100 * share[k]:.0f} %" for k in np.argsort(-share)[:5] if share[k])
print(f"{found}; seen at {height}x{width} px")

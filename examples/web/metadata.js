"use strict";
// onnxruntime-web does not give a file's metadata, so this reads them from the file itself. An ONNX file is a
// protocol buffer; its field 14 is metadata_props, whose fields 1 and 2 are key and value.

function readFields(bytes, visit) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1, byte;
    do { byte = bytes[at++]; value += (byte & 127) * scale; scale *= 128; } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const tag = varint(), field = Math.floor(tag / 8), type = tag % 8;
    if (type === 0) varint();
    else if (type === 1) at += 8;
    else if (type === 5) at += 4;
    else if (type === 2) {
      const length = varint();
      visit(field, bytes.subarray(at, at + length));
      at += length;
    } else throw new Error("this is no ONNX file");
  }
}

function readMetadata(buffer) {
  const text = new TextDecoder();
  let found = null;
  readFields(new Uint8Array(buffer), (field, entry) => {
    if (field !== 14) return;
    const pair = {};
    readFields(entry, (key, value) => { pair[key] = text.decode(value); });
    if (pair[1] === "sparse_seg") found = JSON.parse(pair[2]);
  });
  if (!found) throw new Error("the file was not written by tools/export.py: it has no property sparse_seg");
  return found;
}

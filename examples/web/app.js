"use strict";
// Reads models.json, a list of exported files with rising budgets: ["f05.onnx", "f10.onnx", "f20.onnx"].

const $ = (id) => document.getElementById(id);
const view = $("view").getContext("2d");  // as large as the picture
const seen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });  // as the network sees it
const loaded = [];  // one {session, about} for each file, as they are needed
let files = [], source = null, running = false, again = false, camera = null;

function say(text) { $("status").textContent = text; }

async function load(index) {
  if (!loaded[index]) {
    const answer = await fetch(files[index]);
    if (!answer.ok) throw new Error(`${files[index]}: ${answer.status} ${answer.statusText}`);
    const buffer = await answer.arrayBuffer();
    const about = readMetadata(buffer);
    if (about.batch !== 1) throw new Error(`${files[index]} is for ${about.batch} images at once; export one`);
    const session = await ort.InferenceSession.create(buffer, { executionProviders: ["wasm"] });
    loaded[index] = { session, about };
  }
  return loaded[index];
}

function toTensor(pixels, about) {
  const [height, width] = about.size, area = height * width;
  if (about.input === "uint8") {
    const bytes = new Uint8Array(3 * area);
    for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) bytes[3 * i + c] = pixels[4 * i + c];
    return new ort.Tensor("uint8", bytes, [1, height, width, 3]);
  }
  const values = new Float32Array(3 * area);
  for (let c = 0; c < 3; c++) for (let i = 0; i < area; i++) values[c * area + i] = pixels[4 * i + c] / 255;
  return new ort.Tensor("float32", values, [1, 3, height, width]);
}

function colour(about, index) {
  return about.colours[index] || [(index * 83) % 256, (index * 151) % 256, (index * 199) % 256];
}

function paint(frame, outputs, about) {
  Object.assign(view.canvas, { width: frame.width, height: frame.height });
  view.drawImage(frame, 0, 0);
  const classes = outputs.classes.data, [height, width] = about.size, { width: across, height: down } = view.canvas;
  const palette = about.names.map((_, index) => [...colour(about, index), 255]), colours = new ImageData(width, height);
  classes.forEach((index, i) => colours.data.set(palette[index], 4 * i));
  seen.putImageData(colours, 0, 0);
  view.imageSmoothingEnabled = false;
  view.globalAlpha = 0.5;
  view.drawImage(seen.canvas, 0, 0, across, down);
  view.globalAlpha = 1;
  if (!outputs.fine_blocks || !$("blocks").checked) return;
  const side = about.strides[about.strides.length - 1], columns = outputs.fine_blocks.dims[2];
  const [right, below] = [side * across / width, side * down / height];
  view.strokeStyle = "rgba(255, 255, 255, 0.8)";
  outputs.fine_blocks.data.forEach((fine, i) => {
    if (fine) view.strokeRect((i % columns) * right + 0.5, Math.floor(i / columns) * below + 0.5, right - 1, below - 1);
  });
}

function legend(about, classes) {
  const present = new Set(classes);
  $("legend").replaceChildren(...about.names.flatMap((name, index) => {
    if (!present.has(index)) return [];
    const entry = document.createElement("span"), swatch = document.createElement("i");
    swatch.style.background = `rgb(${colour(about, index).join(",")})`;
    entry.append(swatch, name);
    return [entry];
  }));
}

async function segment() {
  if (!source) return;
  if (running) { again = true; return; }
  running = true;
  try {
    const { session, about } = await load(Number($("model").value));
    const [height, width] = about.size;
    $("budget").textContent = about.dense ? `dense, output stride ${about.dense}` :
      `${(100 * about.fine_fraction).toFixed(0)} %`;
    const frame = await createImageBitmap(source);
    Object.assign(seen.canvas, { width, height });
    seen.drawImage(frame, 0, 0, width, height);
    const images = toTensor(seen.getImageData(0, 0, width, height).data, about);
    const start = performance.now();
    const outputs = await session.run({ images });
    const milliseconds = performance.now() - start;
    paint(frame, outputs, about);
    legend(about, outputs.classes.data);
    say(`${milliseconds.toFixed(0)} ms; seen at ${width} x ${height} px`);
    document.body.dataset.done = String(Number(document.body.dataset.done || 0) + 1);
  } catch (error) {
    say(`Error: ${error.message}`);
    stopCamera();
  }
  running = false;
  if (again) { again = false; segment(); }
}

function stopCamera() {
  if (!camera) return;
  camera.getTracks().forEach((track) => track.stop());
  camera = null;
  $("camera").textContent = "Camera";
}

async function startCamera() {
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    say(`No camera: ${error.message}`);
    return;
  }
  $("camera").textContent = "Stop";
  source = $("video");
  source.srcObject = camera;
  await source.play();
  while (camera) {
    await segment();
    await new Promise(requestAnimationFrame);
  }
}

$("camera").addEventListener("click", () => (camera ? stopCamera() : startCamera()));
$("picture").addEventListener("change", async (event) => {
  stopCamera();
  const [file] = event.target.files;
  if (!file) return;
  try {
    source = await createImageBitmap(file);
  } catch {
    say(`${file.name} is no picture that this browser reads`);
    return;
  }
  segment();
});
$("model").addEventListener("input", segment);
$("blocks").addEventListener("change", segment);

(async () => {
  try {
    const answer = await fetch("models.json");
    if (!answer.ok) throw new Error("models.json is missing: a list of exported files, see README.md");
    files = await answer.json();
    $("model").max = String(files.length - 1);
    await load(0);
    say("Choose a picture, or start the camera.");
    const asked = new URLSearchParams(location.search).get("picture");
    if (asked) {
      source = await createImageBitmap(await (await fetch(asked)).blob());
      await segment();
    }
  } catch (error) {
    say(`Error: ${error.message}`);
  }
})();

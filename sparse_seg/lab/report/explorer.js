for (const explorer of document.querySelectorAll(".explorer")) {
  document.documentElement.classList.add("js");
  const slider = explorer.querySelector(".fraction");
  const steps = [...explorer.querySelectorAll(".step")];
  const show = () => {
    for (const step of steps) step.classList.toggle("on", step.dataset.step === slider.value);
    const says = steps.find((step) => step.dataset.step === slider.value).dataset.says;
    explorer.querySelector("output").textContent = says;
    slider.setAttribute("aria-valuetext", says);
  };
  const follow = () => {
    const link = /^#step-(\d+)$/.exec(location.hash);
    if (!link) return;
    slider.value = link[1];
    show();
    explorer.scrollIntoView();
  };
  for (const cut of explorer.querySelectorAll(".cut")) {
    const pictures = cut.closest(".moving");
    const move = () => pictures.style.setProperty("--cut", `${cut.value}%`);
    cut.addEventListener("input", move);
    pictures.addEventListener("pointermove", (event) => {
      const shot = event.buttons && event.target.closest(".prediction");
      if (!shot) return;
      const box = shot.getBoundingClientRect();
      cut.value = (100 * (event.clientX - box.left)) / box.width;
      move();
    });
    pictures.addEventListener("dragstart", (event) => event.preventDefault());
  }
  slider.addEventListener("input", show);
  addEventListener("hashchange", follow);
  show();
  follow();
}

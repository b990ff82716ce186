// The slider sets how strongly the colours cover the images; without scripts they stay as they are.
const strength = document.getElementById("strength");
if (strength) {
  const show = () => {
    document.documentElement.style.setProperty("--strength", strength.value / 100);
    strength.setAttribute("aria-valuetext", `${strength.value} %`);
  };
  strength.addEventListener("input", show);
  strength.closest("label").hidden = false;
  show();
}

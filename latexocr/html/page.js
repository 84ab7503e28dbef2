"use strict";
// What every page needs. All text reaches the page through text nodes: nothing is parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

/** An element: attributes (functions become listeners, null is left out), then children (elements or texts). */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** A group in a chart that is pressed like a button. */
function pick(label, pressed, press, ...children) {
  return draw(
    "g",
    {
      class: "pick", role: "button", tabindex: 0, "aria-label": label, "aria-pressed": String(pressed), click: press,
      keydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        press();
      },
    },
    draw("title", {}, label),
    ...children,
  );
}

// Pictures lie in blocks of base64; a block is unpacked when the first of its pictures is looked at.
const blocks = new Map();
const KINDS = { i: "png", "/": "jpeg", U: "webp", R: "gif" }; // by base64's first letter of their signatures

function pictureUrl(place) {
  const number = Math.floor(place / data.block);
  if (!blocks.has(number)) blocks.set(number, JSON.parse(document.getElementById(`pictures-${number}`).textContent));
  const encoded = blocks.get(number)[place % data.block];
  return `data:image/${KINDS[encoded[0]]};base64,${encoded}`;
}

const DENSITY = { photo: 1, drawn: 1.45 }; // pixels of the picture that are one of the page's

/** `kind`: "photo", or "drawn" for a rendered formula. */
function picture(place, kind, alt) {
  return make("img", {
    class: kind, alt, srcset: `${pictureUrl(place)} ${DENSITY[kind]}x`,
    load: ({ target }) => { // a picture that would shrink to a hairline keeps its size and can be moved sideways
      if (target.naturalWidth > 2.5 * target.parentElement.clientWidth) target.classList.add("wide");
    },
  });
}

function count(number, singular, plural = `${singular}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? singular : plural}`;
}

/** A figure without its unit; `share` as a percentage. */
function shown(value, share) {
  if (value === null || value === undefined) return "–";
  const number = share ? 100 * value : value;
  if (share ? number === 0 || number === 100 : Number.isInteger(number)) return number.toLocaleString("en");
  return number.toFixed(share && (number < 1 || number > 99) ? 2 : 1);
}

// Light or dark: as the system says, until the reader says otherwise.
const system = matchMedia("(prefers-color-scheme: dark)");

function remembered(value) {
  try { // pages opened as files have no storage in some browsers
    if (value) localStorage.setItem("latexocr-theme", value);
    return localStorage.getItem("latexocr-theme");
  } catch {
    return value ?? null;
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const button of document.querySelectorAll(".theme")) button.textContent = theme === "dark" ? "Light" : "Dark";
}

function themeButton() {
  return make("button", {
    class: "plain theme", type: "button", title: "Light or dark (t)",
    click: () => {
      const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      remembered(theme);
      setTheme(theme);
    },
  });
}

function startPage(...children) {
  document.body.append(make("main", {}, children));
  setTheme(remembered() ?? (system.matches ? "dark" : "light"));
  system.addEventListener("change", () => remembered() ?? setTheme(system.matches ? "dark" : "light"));
}

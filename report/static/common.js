"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// `1 prompt`, `2 prompts`.
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// A number with so many digits, and no sign before a zero.
const fixed = (value, digits) => value.toFixed(digits).replace(/^-(?=0\.?0*$)/, "");

// A difference, with its sign unless it is zero.
const signed = (value, digits) => (Number(value.toFixed(digits)) > 0 ? "+" : "") + fixed(value, digits);

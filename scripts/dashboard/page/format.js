// Numbers as people read them.

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en-US") : "–";
}

export function short(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toFixed(2)}B`;
  if (size >= 1e6) return `${(value / 1e6).toFixed(2)}M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(1)}k`;
  return size >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

export function number(value, digits = 4) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
  return size >= 1000 ? count(value) : value.toPrecision(digits);
}

export function percent(share) {
  return isNumber(share) ? `${(100 * share).toFixed(share < 0.1 && share > 0 ? 1 : 0)} %` : "–";
}

export function duration(seconds) {
  if (!isNumber(seconds) || seconds < 0) return "–";
  const whole = Math.round(seconds);
  const [d, hours, m, s] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60, whole % 60];
  if (d) return `${d}d ${hours}h`;
  if (hours) return `${hours}h ${String(m).padStart(2, "0")}m`;
  return m ? `${m}m ${String(s).padStart(2, "0")}s` : `${s}s`;
}

export function ago(seconds) {
  if (!isNumber(seconds)) return "–";
  const gone = Date.now() / 1000 - seconds;
  return gone < 3 ? "now" : `${duration(gone)} ago`;
}

export function bytes(value) {
  if (!isNumber(value)) return "–";
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(1)} GiB` : `${(value / 2 ** 20).toFixed(0)} MiB`;
}

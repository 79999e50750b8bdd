// The server: requests with the token, and a link that comes back by itself where it was.

const KEY = "dashboard-token";
let token = "";
let onUnknown = () => {};

export function takeToken() {
  const given = /^#token=([A-Za-z0-9_-]+)$/.exec(location.hash);
  if (given) {
    sessionStorage.setItem(KEY, given[1]);
    history.replaceState(null, "", location.pathname);
  }
  token = sessionStorage.getItem(KEY) || "";
  return token !== "";
}

export function setToken(text) {
  token = text.trim();
  sessionStorage.setItem(KEY, token);
}

export function whenUnknown(action) {
  onUnknown = action;
}

export class ApiError extends Error {
  constructor(status, body) {
    super((body && body.error) || `The server answered ${status}.`);
    this.status = status;
    this.body = body;
  }
}

export const runPath = (id) => `/runs/${encodeURIComponent(id)}`;

export async function request(path, options = {}) {
  const response = await fetch(`/api/v1${path}`, {
    ...options, cache: "no-store", headers: { ...options.headers, authorization: `Bearer ${token}` },
  });
  if (response.status === 401) onUnknown();
  return response;
}

export async function get(path) {
  const response = await request(path);
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new ApiError(response.status, body);
  return body;
}

export async function post(path, value = {}) {
  const response = await request(path, {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value),
  });
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new ApiError(response.status, body);
  return body;
}

const SILENT_MS = 25000; // the server says something every 10 seconds at least

export class Link {
  constructor(id, { message, status }) {
    this.id = id;
    this.message = message;
    this.status = status;
    this.position = null;
    this.failures = 0;
    this.open();
  }

  open() {
    const since = this.position === null ? "" : `?since=${encodeURIComponent(this.position)}`;
    const socket = new WebSocket(
      `ws://${location.host}/ws/runs/${encodeURIComponent(this.id)}${since}`, ["dashboard.v1", `bearer.${token}`],
    );
    this.socket = socket;
    this.status(this.failures || this.position !== null ? "reconnecting" : "connecting");
    socket.onmessage = (event) => {
      if (this.socket !== socket) return;
      const said = JSON.parse(event.data);
      this.failures = 0;
      this.status("live");
      this.listen();
      if (!said.partial) this.position = said.position;
      this.message(said);
    };
    socket.onclose = () => {
      if (this.socket === socket) this.again();
    };
    this.listen();
  }

  listen() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.again(), SILENT_MS);
  }

  again() {
    this.leave();
    this.status("reconnecting");
    this.failures += 1;
    const wait = Math.min(4000, 250 * 2 ** Math.min(this.failures, 6)) * (0.75 + Math.random() / 2);
    this.retry = setTimeout(() => this.open(), wait);
  }

  leave() {
    clearTimeout(this.silence);
    const socket = this.socket;
    this.socket = null;
    if (socket) {
      socket.onclose = null;
      socket.close();
    }
  }

  close() {
    clearTimeout(this.retry);
    this.leave();
  }
}

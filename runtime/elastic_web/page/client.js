// The page's side of the worker: calls that are promises.

export class Client {
  constructor() {
    this.number = 0;
    this.open = new Map();
    this.worker = new Worker(new URL("./worker.js", import.meta.url), {type: "module"});
    this.worker.onmessage = ({data}) => {
      const {resolve, reject, heard} = this.open.get(data.id);
      if (data.kind !== "done" && data.kind !== "failed") { heard(data); return; }
      this.open.delete(data.id);
      if (data.kind === "done") resolve(data); else reject(Object.assign(new Error(data.message), {name: data.name}));
    };
    this.worker.onerror = event => {
      event.preventDefault();
      const error = new Error(`The worker did not start: ${event.message ?? "worker.js cannot be read"}.`);
      for (const {reject} of this.open.values()) reject(error);
      this.open.clear();
    };
  }

  /** Ask the worker for `kind`; `heard` gets what it says meanwhile. The promise has the call's `id`, to cancel it by. */
  call(kind, details = {}, heard = () => {}) {
    const id = ++this.number;
    const promise = new Promise((resolve, reject) => {
      this.open.set(id, {resolve, reject, heard});
      this.worker.postMessage({id, kind, ...details});
    });
    return Object.assign(promise, {id});
  }

  cancel(id) { this.worker.postMessage({kind: "cancel", of: id}); }
}

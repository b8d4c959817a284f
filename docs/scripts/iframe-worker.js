// A browser starts no worker from file://. There, run the worker's script in a hidden frame, with the same messages.
if (location.protocol === "file:") {
  window.Worker = class {
    onmessage = null;
    onerror = null;
    onmessageerror = null;

    constructor(url) {
      const source = new URL(url, document.baseURI).href;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => {
        this.frame.onload = () => {
          const inside = this.frame.contentWindow;
          const script = inside.document.createElement("script");
          inside.postMessage = (data) => this.onmessage?.({ data });
          script.onload = () => resolve(inside);
          script.onerror = (event) => this.onerror?.(event);
          script.src = source;
          inside.document.body.append(script);
          this.frame.onload = null;
        };
        document.body.append(this.frame);
      });
    }

    postMessage(data) {
      this.ready.then((inside) => inside.onmessage({ data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
}

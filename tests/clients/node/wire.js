// A grpc-js client of `support.wire_app`: node wire.js PORT CA.PEM. Prints one JSON object: what each call ended with.
"use strict";

const fs = require("fs");
const grpc = require("@grpc/grpc-js");

const [port, ca] = process.argv.slice(2);
const unlimited = { "grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1 };
const client = new grpc.Client(`localhost:${port}`, grpc.credentials.createSsl(fs.readFileSync(ca)), unlimited);
const same = (bytes) => bytes;
const path = (method) => `/wire.Test/${method}`;
const bytes = (text) => Buffer.from(text);

function unary(method, body, metadata = new grpc.Metadata(), options = {}) {
  return new Promise((resolve) => {
    const call = client.makeUnaryRequest(path(method), same, same, body, metadata, options, (error, reply) => {
      if (error) resolve({ code: grpc.status[error.code], details: error.details, metadata: shown(error.metadata) });
      else resolve({ code: "OK", length: reply.length, text: reply.subarray(0, 40).toString() });
    });
    if (options.cancelAfter) setTimeout(() => call.cancel(), options.cancelAfter);
  });
}

function shown(metadata) {
  const details = metadata.get("grpc-status-details-bin")[0];
  return details ? details.toString("hex") : "";
}

// Any kind of stream: say all of it, hear all of it.
function talk(call, bodies) {
  return new Promise((resolve) => {
    let count = 0, length = 0;
    call.on("data", (reply) => { count += 1; length += reply.length; });
    call.on("error", () => {});
    call.on("status", (status) => resolve({ code: grpc.status[status.code], count, length }));
    for (const body of bodies) call.write(body);
    if (call.end) call.end();
  });
}

const chat = (method, bodies) => talk(client.makeBidiStreamRequest(path(method), same, same), bodies);

function collect(method, bodies) {
  return new Promise((resolve) => {
    const call = client.makeClientStreamRequest(path(method), same, same, (error, reply) => {
      resolve(error ? { code: grpc.status[error.code] } : { code: "OK", text: reply.toString() });
    });
    for (const body of bodies) call.write(body);
    call.end();
  });
}

function count(number, size) {
  const body = bytes(JSON.stringify({ count: number, size }));
  return talk(client.makeServerStreamRequest(path("Count"), same, same, body), []);
}

function cancelledStream() {
  return new Promise((resolve) => {
    const call = client.makeBidiStreamRequest(path("HoldStream"), same, same);
    call.on("data", () => call.cancel());
    call.on("error", () => {});
    call.on("status", (status) => resolve({ code: grpc.status[status.code] }));
    call.write(bytes("node stream"));
  });
}

function refusedWith(how) {
  const metadata = new grpc.Metadata();
  metadata.set("x-admit", how);
  return unary("Guarded", Buffer.alloc(5_000_000), metadata);
}

async function main() {
  const ends = {};
  ends.unary = await unary("Echo", bytes("hello"));
  ends.empty = await unary("Echo", Buffer.alloc(0));
  ends.large = await unary("Echo", Buffer.alloc(20_000_000));
  ends["too large"] = await unary("Echo", Buffer.alloc(25 * 2 ** 20));
  ends.abort = await unary("Abort", bytes(JSON.stringify({ status: 5, message: "Grüße, 世界", details: "00ff" })));
  ends.unknown = await unary("Nothing", bytes(""));
  ends.gzip = await unary("Echo", Buffer.alloc(100_000), new grpc.Metadata(), { "grpc.default_compression_algorithm": 2 });
  ends.deadline = await unary("Hold", bytes("node deadline"), new grpc.Metadata(), { deadline: Date.now() + 300 });
  ends.cancel = await unary("Hold", bytes("node cancel"), new grpc.Metadata(), { cancelAfter: 300 });
  ends["refused by a reply"] = await refusedWith("reply");
  ends["refused by a status"] = await refusedWith("abort");
  ends.chat = await chat("Chat", Array.from({ length: 100 }, () => Buffer.alloc(10_000)));
  ends.aborted = await chat("AbortAfter", [bytes("a"), bytes("stop"), bytes("b")]);
  ends.early = await chat("FirstOnly", Array.from({ length: 100 }, () => Buffer.alloc(10_000)));
  ends.collect = await collect("Collect", Array.from({ length: 50 }, () => Buffer.alloc(100_000)));
  ends.count = await count(1000, 1000);
  ends["large count"] = await count(10, 2_000_000);
  ends["cancelled stream"] = await cancelledStream();
  const many = await Promise.all(Array.from({ length: 300 }, (_, number) => unary("Echo", bytes(`${number}`))));
  ends.many = { wrong: many.filter((end, number) => end.code !== "OK" || end.text !== `${number}`).length };
  client.close();
  console.log(JSON.stringify(ends));
}

main();

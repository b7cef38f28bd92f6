// Every form of the API in a browser: fetch over REST, and gRPC-Web by Clarifai's own package. Bundled for a page whose
// server gives /config.json and takes what came back at /found: form → value, or the error that the page sees.
import { ClarifaiStub, V2PromiseClient } from "clarifai-web-grpc";
import { Concept, Data, Image, Input, Model } from "clarifai-web-grpc/proto/clarifai/api/resources_pb";
import { OutputConfig, OutputInfo, Text, UserAppIDSet } from "clarifai-web-grpc/proto/clarifai/api/resources_pb";
import { GetModelRequest, ListModelsRequest } from "clarifai-web-grpc/proto/clarifai/api/service_pb";
import { MultiOutputResponse, PostModelOutputsRequest } from "clarifai-web-grpc/proto/clarifai/api/service_pb";
import { GrpcWebClientBase, MethodDescriptor, MethodType } from "grpc-web";

const { base, key, web, picture, pictures, stranger } = await (await fetch("/config.json")).json();
const TEXT = "Decision trees are grown on bootstrap samples and vote together.";
const full = `${base}/v2/users/appliance/apps/main`;
const authorization = `Key ${key}`;

// ---- fetch ----

const image = (index = 0, id = "") => ({ id, data: { image: { base64: pictures[index % pictures.length] } } });
const batch = (count) => Array.from({ length: count }, (_, index) => image(index, `demo_${index}`));

async function said(response) {
  const reply = await response.json();
  if (reply.status.code === 10000) return reply;
  const bad = (reply.outputs ?? []).find((output) => output.status.code !== 10000) ?? reply;
  throw new Error(`HTTP ${response.status}, ${reply.status.code}, ${bad.status.code}: ${bad.status.details}`);
}

const ids = ({ outputs }) => outputs[0].data.concepts.map((concept) => concept.id);
const get = async (url) => said(await fetch(url, { headers: { Authorization: authorization } }));

// As the documentation's sample has it: no Content-Type, so that the browser says text/plain.
async function post(inputs, more = {}, { url = `${full}/models/digits/outputs`, headers = {} } = {}) {
  const asked = { method: "POST", headers: { Accept: "application/json", Authorization: authorization, ...headers } };
  return said(await fetch(url, { ...asked, body: JSON.stringify({ inputs, ...more }) }));
}

const limited = (output_config) => post([image()], { model: { model_version: { output_info: { output_config } } } });

const byFetch = {
  "the documentation's sample: `POST /v2/models/…/outputs`, user_app_id in the body, no Content-Type": async () => {
    const user_app_id = { user_id: "appliance", app_id: "main" };
    return ids(await post([image()], { user_app_id }, { url: `${base}/v2/models/digits/outputs` }));
  },
  "`POST /v2/users/…/apps/…/models/…/outputs`": async () => ids(await post([image()])),
  "`POST …/versions/…/outputs`": async () =>
    ids(await post([image()], {}, { url: `${full}/models/digits/versions/1/outputs` })),
  "`Content-Type: application/json`": async () =>
    ids(await post([image()], {}, { headers: { "Content-Type": "application/json" } })),
  "`Authorization: Bearer …`": async () => ids(await post([image()], {}, { headers: { Authorization: `Bearer ${key}` } })),
  "an image by URL": async () => ids(await post([{ data: { image: { url: `${web}/${picture}` } } }])),
  "a text": async () => ids(await post([{ data: { text: { raw: TEXT } } }], {}, { url: `${full}/models/ml-topics/outputs` })),
  "a batch of 128": async () =>
    (await post(batch(128))).outputs.map(({ input, data }) => [input.id, data.concepts[0].id]),
  "a batch of 129": async () => ids(await post(batch(129))),
  "`max_concepts`": async () => ids(await limited({ max_concepts: 3 })),
  "`min_value`": async () => ids(await limited({ min_value: 0.6 })),
  "`select_concepts`": async () => ids(await limited({ select_concepts: [{ id: "4" }, { name: "five" }] })),
  "`max_concepts` 201": async () => ids(await limited({ max_concepts: 201 })),
  "bytes that are no image": async () => ids(await post([{ data: { image: { base64: btoa("no picture") } } }])),
  "a wrong PAT": async () => ids(await post([image()], {}, { headers: { Authorization: `Key ${"0".repeat(64)}` } })),
  "an unknown model": async () => ids(await post([image()], {}, { url: `${full}/models/nothing/outputs` })),
  "`GET …/models`": async () => (await get(`${full}/models`)).models.map((model) => model.id).sort(),
  "`GET …/models/…`": async () => (await get(`${full}/models/digits`)).model.model_version.id,
  "`POST …/outputs/generate`, read line by line": async () => {
    const asked = { method: "POST", headers: { Authorization: authorization }, body: JSON.stringify({ inputs: [image()] }) };
    const response = await fetch(`${full}/models/digits/outputs/generate`, asked);
    const found = [];
    let rest = "";
    for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop();
      for (const line of lines) found.push(ids(JSON.parse(line).result));
    }
    return found;
  },
  "a certificate of an unknown authority": async () => (await fetch(stranger)).status,
};

// ---- gRPC-Web ----

const client = ClarifaiStub.grpc(base);
const promises = new V2PromiseClient(base);
const metadata = { authorization };
const owner = new UserAppIDSet().setUserId("appliance").setAppId("main");
const input = (index = 0, id = "") => {
  const data = new Data().setImage(new Image().setBase64(pictures[index % pictures.length]));
  return new Input().setId(id).setData(data);
};
const request = (inputs) => new PostModelOutputsRequest().setUserAppId(owner).setModelId("digits").setInputsList(inputs);

// As documented: what is not SUCCESS is an error.
function outputs(response) {
  const status = response.getStatus();
  if (status.getCode() !== 10000) throw new Error(`${status.getCode()}: ${status.getDetails()}`);
  return response.getOutputsList();
}

const conceptIds = (response) => outputs(response)[0].getData().getConceptsList().map((concept) => concept.getId());

const called = (method, asked, headers = metadata, by = client) =>
  new Promise((resolve, reject) => by[method](asked, headers, (error, response) => (error ? reject(error) : resolve(response))));

// The package is older than `model_version.output_info`.
const configured = (config) =>
  request([input()]).setModel(new Model().setOutputInfo(new OutputInfo().setOutputConfig(config)));

// The package is older than the RPC; grpc-web itself calls it, with the package's messages.
const generate = new MethodDescriptor(
  "/clarifai.api.V2/GenerateModelOutputs",
  MethodType.SERVER_STREAMING,
  PostModelOutputsRequest,
  MultiOutputResponse,
  (asked) => asked.serializeBinary(),
  MultiOutputResponse.deserializeBinary,
);

function streamed(format) {
  return new Promise((resolve, reject) => {
    const found = [];
    const url = `${base}/clarifai.api.V2/GenerateModelOutputs`;
    const stream = new GrpcWebClientBase({ format }).serverStreaming(url, request([input()]), metadata, generate);
    stream.on("data", (response) => found.push(conceptIds(response)));
    stream.on("error", reject);
    stream.on("end", () => resolve(found));
  });
}

const byGrpcWeb = {
  "`ClarifaiStub.grpc(\"https://…\").postModelOutputs(…)`": async () =>
    conceptIds(await called("postModelOutputs", request([input()]))),
  "`new V2PromiseClient(\"https://…\")`": async () =>
    conceptIds(await promises.postModelOutputs(request([input()]), metadata)),
  "`X-Clarifai-Session-Token`, as the package's README has it": async () =>
    conceptIds(await called("postModelOutputs", request([input()]), { "X-Clarifai-Session-Token": key })),
  "`format: \"text\"`": async () => conceptIds(await called("postModelOutputs", request([input()]))),
  "`format: \"binary\"`": async () => {
    const unary = new MethodDescriptor(
      "/clarifai.api.V2/PostModelOutputs",
      MethodType.UNARY,
      PostModelOutputsRequest,
      MultiOutputResponse,
      (asked) => asked.serializeBinary(),
      MultiOutputResponse.deserializeBinary,
    );
    const binary = new GrpcWebClientBase({ format: "binary" });
    const url = `${base}/clarifai.api.V2/PostModelOutputs`;
    return conceptIds(
      await new Promise((resolve, reject) => {
        binary.rpcCall(url, request([input()]), metadata, unary, (error, response) =>
          error ? reject(error) : resolve(response),
        );
      }),
    );
  },
  "a text": async () => {
    const data = new Data().setText(new Text().setRaw(TEXT));
    const asked = request([new Input().setData(data)]).setModelId("ml-topics");
    return conceptIds(await called("postModelOutputs", asked));
  },
  "a batch of 128": async () => {
    const inputs = Array.from({ length: 128 }, (_, index) => input(index, `demo_${index}`));
    const response = await called("postModelOutputs", request(inputs));
    return outputs(response).map((output) => [output.getInput().getId(), output.getData().getConceptsList()[0].getId()]);
  },
  "a batch of 129": async () => {
    const inputs = Array.from({ length: 129 }, (_, index) => input(index, `demo_${index}`));
    return conceptIds(await called("postModelOutputs", request(inputs)));
  },
  "`setMaxConcepts`": async () =>
    conceptIds(await called("postModelOutputs", configured(new OutputConfig().setMaxConcepts(3)))),
  "`setSelectConceptsList`": async () => {
    const selected = [new Concept().setId("4"), new Concept().setName("five")];
    return conceptIds(await called("postModelOutputs", configured(new OutputConfig().setSelectConceptsList(selected))));
  },
  "`getModel`": async () => {
    const asked = new GetModelRequest().setUserAppId(owner).setModelId("digits");
    return (await called("getModel", asked)).getModel().getModelVersion().getId();
  },
  "`listModels`": async () => {
    const response = await called("listModels", new ListModelsRequest().setUserAppId(owner));
    return response.getModelsList().map((model) => model.getId()).sort();
  },
  "`GenerateModelOutputs`, by grpc-web's `serverStreaming`": () => streamed("text"),
  "`StreamModelOutputs`": async () => typeof client.streamModelOutputs,
  "a wrong PAT": async () =>
    conceptIds(await called("postModelOutputs", request([input()]), { authorization: `Key ${"0".repeat(64)}` })),
  "an RPC that is not served": () => called("listInputs", new ListModelsRequest()),
};

// ---- what docs/sdk.md has for browsers ----

async function page() {
  const frame = Object.assign(document.createElement("iframe"), { src: "/page.html" });
  const loaded = new Promise((resolve) => frame.addEventListener("load", resolve));
  document.body.append(frame);
  await loaded;
  const chosen = new DataTransfer();
  chosen.items.add(new File([Uint8Array.from(atob(pictures[0]), (letter) => letter.charCodeAt(0))], "picture.png"));
  const [file, answer] = ["picture", "answer"].map((id) => frame.contentDocument.getElementById(id));
  const answered = new Promise((resolve) => new MutationObserver(resolve).observe(answer, { childList: true }));
  file.files = chosen.files;
  file.dispatchEvent(new Event("change"));
  await answered;
  return answer.value;
}

const byPage = {
  Browser: page,
  "gRPC-Web": async () => {
    const script = "/digits.js";
    return (await import(script)).predict(pictures[0]);
  },
};

// ---- all of them ----

async function driven(forms) {
  const found = {};
  for (const [form, drive] of Object.entries(forms)) {
    try {
      found[form] = (await drive()) ?? "nothing";
    } catch (error) {
      found[form] = `${error.name}: ${error.code === undefined ? "" : `gRPC ${error.code}: `}${error.message}`;
    }
  }
  return found;
}

const found = { fetch: await driven(byFetch), web: await driven(byGrpcWeb), page: await driven(byPage) };
await fetch("/found", { method: "POST", body: JSON.stringify(found) });

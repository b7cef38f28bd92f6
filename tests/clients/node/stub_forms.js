// Every form of clarifai-nodejs-grpc, by what its user writes: node stub_forms.js HOST:PORT CA SAMPLES WEB, the key in
// CLARIFAI_PAT. Prints a JSON object: form → what came back, or the error that its user sees.
//
// With "predict" as fifth word only one prediction is made, by a stub that knows its host from CLARIFAI_GRPC_BASE.
// With "certificate KEY CERTIFICATE" after WEB it is made by a stub with a client's certificate, and by one without.
"use strict";

const fs = require("fs");
const path = require("path");
const { ClarifaiStub, grpc } = require("clarifai-nodejs-grpc");

const [base, ca, samples, web, only, ...credentials] = process.argv.slice(2);
const names = fs.readdirSync(samples).filter((name) => name.endsWith(".png")).sort();
const pictures = names.map((name) => fs.readFileSync(path.join(samples, name)));
const text = "Decision trees are grown on bootstrap samples and vote together.";
const owner = { user_id: "appliance", app_id: "main" };

const metadata = new grpc.Metadata();
metadata.set("authorization", "Key " + process.env.CLARIFAI_PAT);
const stub = only === "predict" ? ClarifaiStub.grpc() : ClarifaiStub.grpc(base);

const call = (method, request, by = stub, headers = metadata) =>
  new Promise((resolve, reject) => {
    by[method](request, headers, (error, response) => (error ? reject(error) : resolve(response)));
  });

const input = (index = 0, id = "") => ({ id, data: { image: { base64: pictures[index % pictures.length] } } });
const request = (inputs, more = {}) => ({ user_app_id: owner, model_id: "digits", inputs, ...more });
const post = (inputs, more = {}, by = stub) => call("PostModelOutputs", request(inputs, more), by);
const batch = (count) => Array.from({ length: count }, (_, index) => input(index, `demo_${index}`));
const told = ({ code, description, details }) => `${code} ${description}: ${details}`;

// As documented: what is not SUCCESS is an error.
function ids(response) {
  if (response.status.code !== 10000) throw new Error(`${told(response.status)} ${firstStatus(response)}`);
  return response.outputs[0].data.concepts.map((concept) => concept.id);
}

function firstStatus({ outputs = [] }) {
  const bad = outputs.find(({ status }) => status.code !== 10000);
  return bad ? told(bad.status) : "";
}

function heard(stream) {
  return new Promise((resolve, reject) => {
    const messages = [];
    stream.on("data", (response) => messages.push(ids(response)));
    stream.on("error", reject);
    stream.on("end", () => resolve(messages));
  });
}

function streamed(requests) {
  const stream = stub.StreamModelOutputs(metadata);
  for (const one of requests) stream.write(one);
  stream.end();
  return heard(stream);
}

// The generated client of the same package: messages as classes, and credentials of one's own.
async function typed() {
  const { V2Client } = require("clarifai-nodejs-grpc/proto/clarifai/api/service_grpc_pb");
  const { PostModelOutputsRequest } = require("clarifai-nodejs-grpc/proto/clarifai/api/service_pb");
  const { Data, Image, Input, UserAppIDSet } = require("clarifai-nodejs-grpc/proto/clarifai/api/resources_pb");
  const image = new Image().setBase64(pictures[0]);
  const asked = new PostModelOutputsRequest()
    .setUserAppId(new UserAppIDSet().setUserId("appliance").setAppId("main"))
    .setModelId("digits")
    .setInputsList([new Input().setData(new Data().setImage(image))]);
  const client = new V2Client(base, grpc.credentials.createSsl(fs.readFileSync(ca)));
  const response = await call("postModelOutputs", asked, client);
  return response.getOutputsList()[0].getData().getConceptsList().map((concept) => concept.getId());
}

const limits = (output_config) => ({ model: { model_version: { output_info: { output_config } } } });
const method = (more = []) => ({
  data: {
    metadata: { fields: { _method_name: { stringValue: "predict" } } },
    parts: [{ id: "image", data: { image: { base64: pictures[0] } } }, ...more],
  },
});

const forms = {
  "`ClarifaiStub.grpc(\"host:port\")`": async () => ids(await post([input()])),
  "`ClarifaiStub.json()`": async () => ClarifaiStub.json().getChannel().getTarget(),
  "`ClarifaiStub.insecureGrpc()`": async () => ClarifaiStub.insecureGrpc().getChannel().getTarget(),
  "`PostModelOutputs`, `image: { base64 }`": async () => ids(await post([input()])),
  "`PostModelOutputs`, `image: { url }`": async () =>
    ids(await post([{ data: { image: { url: `${web}/${names[0]}` } } }])),
  "`PostModelOutputs`, `text: { raw }`": async () =>
    ids(await post([{ data: { text: { raw: text } } }], { model_id: "ml-topics" })),
  "`PostModelOutputs`, `img: { url }`, as the documentation writes it": async () =>
    ids(await post([{ data: { img: { url: `${web}/${names[0]}` } } }])),
  "`version_id`": async () => ids(await post([input()], { version_id: "1" })),
  "`model.output_info.output_config`, as documented": async () =>
    ids(await post([input()], { model: { output_info: { output_config: { max_concepts: 3 } } } })),
  "`model.model_version.output_info.output_config`": async () => ids(await post([input()], limits({ max_concepts: 3 }))),
  "`min_value`": async () => ids(await post([input()], limits({ min_value: 0.6 }))),
  "`select_concepts`": async () =>
    ids(await post([input()], limits({ select_concepts: [{ id: "4" }, { name: "five" }] }))),
  "`select_concepts` that matches in part": async () => {
    const response = await post([input()], limits({ select_concepts: [{ id: "4" }, { id: "no such" }] }));
    return [response.status.code, ...response.outputs[0].data.concepts.map((concept) => concept.id)];
  },
  "`max_concepts` 201": async () => ids(await post([input()], limits({ max_concepts: 201 }))),
  "a batch of 128": async () =>
    (await post(batch(128))).outputs.map((output) => [output.input.id, output.data.concepts[0].id]),
  "a batch of 129": async () => ids(await post(batch(129))),
  "one bad input of two": async () => {
    const response = await post([input(), { id: "bad", data: { image: { base64: Buffer.from("no picture") } } }]);
    return [response.status.code, ...response.outputs.map((output) => output.status.code)];
  },
  "a method's arguments as parts": async () =>
    (await post([method([{ id: "max_concepts", data: { int_value: 2 } }])])).outputs[0].data.parts[0].data.concepts.map(
      (concept) => concept.id,
    ),
  "`GenerateModelOutputs`": () => heard(stub.GenerateModelOutputs(request([input()]), metadata)),
  "`StreamModelOutputs`": () => streamed([request([input()]), request([input()])]),
  "`GetModel`": async () => (await call("GetModel", { user_app_id: owner, model_id: "digits" })).model.model_version.id,
  "`GetModelVersion`": async () =>
    (await call("GetModelVersion", { user_app_id: owner, model_id: "digits" })).model_version.id,
  "`GetModelOutputInfo`": async () => {
    const response = await call("GetModelOutputInfo", { user_app_id: owner, model_id: "digits" });
    return response.model.model_version.output_info.data.concepts.length;
  },
  "`ListModels`": async () =>
    (await call("ListModels", { user_app_id: owner, page: 1, per_page: 10 })).models.map((model) => model.id).sort(),
  "`ListModelVersions`": async () =>
    (await call("ListModelVersions", { user_app_id: owner, model_id: "digits" })).model_versions.map(({ id }) => id),
  "`ListConcepts`": async () => (await call("ListConcepts", { user_app_id: owner, per_page: 100 })).concepts.length,
  "`ListModelConcepts`": async () =>
    (await call("ListModelConcepts", { user_app_id: owner, model_id: "digits" })).concepts.length,
  "`GetModelType`": async () => {
    const asked = { user_app_id: owner, model_type_id: "visual-classifier" };
    return (await call("GetModelType", asked)).model_type.input_fields;
  },
  "`GetUser`, `me`": async () => (await call("GetUser", { user_app_id: { user_id: "me" } })).status.code,
  "`MyScopes`": async () => (await call("MyScopes", { user_app_id: owner })).status.code,
  "an RPC that is not served": () => call("ListInputs", { user_app_id: owner }),
  "a wrong PAT": async () => {
    const wrong = new grpc.Metadata();
    wrong.set("authorization", "Key " + "0".repeat(64));
    return ids(await call("PostModelOutputs", request([input()]), stub, wrong));
  },
  "no PAT": async () => ids(await call("PostModelOutputs", request([input()]), stub, new grpc.Metadata())),
  "an unknown model": async () => ids(await post([input()], { model_id: "nothing" })),
  "the generated `V2Client` of `service_grpc_pb`": typed,
};

function certified(certificate) {
  const root = fs.readFileSync(ca);
  const [key, chain] = certificate ? credentials.map((name) => fs.readFileSync(name)) : [];
  const by = new stub.constructor(base, grpc.credentials.createSsl(root, key, chain));
  return call("PostModelOutputs", request([input()]), by, new grpc.Metadata());
}

const chosen =
  only === "predict"
    ? { predict: async () => ids(await post([input()])) }
    : only === "certificate"
      ? {
          "a client certificate: `new stub.constructor(base, createSsl(ca, key, certificate))`": async () =>
            ids(await certified(true)),
          "without a client certificate": async () => ids(await certified(false)),
        }
      : forms;

async function main() {
  console.warn = () => {};
  const found = {};
  for (const [form, drive] of Object.entries(chosen)) {
    try {
      found[form] = await drive();
    } catch (error) {
      found[form] = `${error.name}: ${error.message}`;
    }
  }
  process.stdout.write(JSON.stringify(found) + "\n", () => process.exit());
}

main();

// Every form of clarifai-nodejs, by what its user writes: node sdk_forms.mjs BASE CA SAMPLES WEB, the key in CLARIFAI_PAT.
// Prints a JSON object: form → what came back, or the error that its user sees. A fifth word is the only form to drive.
import fs from "node:fs";
import path from "node:path";
import { App, Input, Model } from "clarifai-nodejs";
import resources from "clarifai-nodejs-grpc/proto/clarifai/api/resources_pb";

const [base, rootCertificatesPath, samples, web, only] = process.argv.slice(2);
const pat = process.env.CLARIFAI_PAT;
const url = "https://clarifai.com/appliance/main/models/digits";
const topicsUrl = "https://clarifai.com/appliance/main/models/ml-topics";
const names = fs.readdirSync(samples).filter((name) => name.endsWith(".png")).sort();
const paths = names.map((name) => path.join(samples, name));
const pictures = paths.map((name) => fs.readFileSync(name));
const picture = pictures[0];
const text = Buffer.from("Decision trees are grown on bootstrap samples and vote together.");
const here = { base, rootCertificatesPath };

const model = (of = url, more = {}) => new Model({ url: of, authConfig: { pat, ...here, ...more } });
const digits = () => model();
const ids = (outputs) => outputs[0].data.conceptsList.map((concept) => concept.id);
const returned = (outputs, index = 0) => outputs[index].data.partsList[0].data.conceptsList.map((concept) => concept.id);
const predicted = async (made) => ids(await made.predictByBytes({ inputBytes: picture, inputType: "image" }));
const image = (inputId, imageBytes = picture) => Input.getInputFromBytes({ inputId, imageBytes });
const batch = (count) =>
  Array.from({ length: count }, (_, index) => image(`demo_${index}`, pictures[index % pictures.length]));

async function limited({ maxConcepts, minValue, selectConcepts }, made = digits()) {
  const outputConfig = new resources.OutputConfig();
  if (maxConcepts) outputConfig.setMaxConcepts(maxConcepts);
  if (minValue) outputConfig.setMinValue(minValue);
  if (selectConcepts) outputConfig.setSelectConceptsList(selectConcepts);
  return ids(await made.predictByBytes({ inputBytes: picture, inputType: "image", outputConfig }));
}

const concept = ({ id = "", name = "" }) => new resources.Concept().setId(id).setName(name);
const byMethod = (more = {}) => ({ methodName: "predict", image: { base64: picture.toString("base64") }, ...more });

async function all(pages) {
  const found = [];
  for await (const page of pages) found.push(...page);
  return found;
}

// The environment's variables, set only while a model is made: the constructor reads them.
function withEnvironment(variables, make) {
  Object.assign(process.env, variables);
  try {
    return make();
  } finally {
    for (const name of Object.keys(variables)) delete process.env[name];
  }
}

const forms = {
  // First: the SDK remembers which hosts speak TLS.
  "a base without `https://`": () => predicted(model(url, { base: base.replace("https://", "") })),
  "`new Model({ url, authConfig: { pat, base, rootCertificatesPath } })`": () => predicted(digits()),
  "`new Model({ url: \"…/versions/1\", authConfig })`": () => predicted(model(`${url}/versions/1`)),
  "`new Model({ modelId, authConfig: { userId, appId, … } })`": () =>
    predicted(new Model({ modelId: "digits", authConfig: { userId: "appliance", appId: "main", pat, ...here } })),
  "`new Model({ modelId, modelVersion: { id }, authConfig })`": () =>
    predicted(
      new Model({
        modelId: "digits",
        modelVersion: { id: "1" },
        authConfig: { userId: "appliance", appId: "main", pat, ...here },
      }),
    ),
  "the PAT from CLARIFAI_PAT": () => predicted(new Model({ url, authConfig: here })),
  "the base from CLARIFAI_API_BASE": () =>
    withEnvironment({ CLARIFAI_API_BASE: base }, () => new Model({ url, authConfig: { pat } }).base),
  "the root certificate from CLARIFAI_ROOT_CERTIFICATES_PATH": () =>
    withEnvironment(
      { CLARIFAI_ROOT_CERTIFICATES_PATH: rootCertificatesPath },
      () => new Model({ url, authConfig: { pat, base } }).rootCertificatesPath,
    ),
  "a root certificate that is not there": () => predicted(model(url, { rootCertificatesPath: "/nowhere/ca.crt" })),
  "a wrong PAT": () => predicted(model(url, { pat: "0".repeat(64) })),
  "an unknown model": () => predicted(model(url.replace("digits", "nothing"))),
  "an unknown version": () => predicted(model(`${url}/versions/9`)),
  "`predictByBytes({ inputBytes, inputType: \"image\" })`": () => predicted(digits()),
  "`predictByBytes({ inputBytes, inputType: \"text\" })`": async () =>
    ids(await model(topicsUrl).predictByBytes({ inputBytes: text, inputType: "text" })),
  "`predictByFilepath({ filepath, inputType: \"image\" })`": async () =>
    ids(await digits().predictByFilepath({ filepath: paths[0], inputType: "image" })),
  "`predictByUrl({ url, inputType: \"image\" })`": async () =>
    ids(await digits().predictByUrl({ url: `${web}/${names[0]}`, inputType: "image" })),
  "`predictByUrl({ url, inputType: \"text\" })`": async () =>
    ids(await model(topicsUrl).predictByUrl({ url: `${web}/text.txt`, inputType: "text" })),
  "a URL of a host that is not allowed": async () =>
    ids(await digits().predictByUrl({ url: "http://169.254.169.254/latest/x.png", inputType: "image" })),
  "bytes that are no image": async () =>
    ids(await digits().predictByBytes({ inputBytes: Buffer.from("no picture"), inputType: "image" })),
  "`predict({ inputs })`": async () => ids(await digits().predict({ inputs: [image("one")] })),
  "a batch of 128": async () =>
    (await digits().predict({ inputs: batch(128) })).map(({ input, data }) => [input.id, data.conceptsList[0].id]),
  "a batch of 129": () => digits().predict({ inputs: batch(129) }),
  "one bad input of two": () => digits().predict({ inputs: [image("good"), image("bad", Buffer.from("no picture"))] }),
  "`outputConfig` with max_concepts": () => limited({ maxConcepts: 3 }),
  "`outputConfig` with max_concepts 201": () => limited({ maxConcepts: 201 }),
  "`outputConfig` with min_value": () => limited({ minValue: 0.6 }),
  "`outputConfig` with select_concepts, by id and by name": () =>
    limited({ selectConcepts: [concept({ id: "4" }), concept({ name: "five" })] }),
  "`loadInfo()`, then `outputConfig`": async () => {
    const made = digits();
    await made.loadInfo();
    return limited({ maxConcepts: 3 }, made);
  },
  "`inferenceParams` beside `outputConfig`": async () => {
    const outputConfig = new resources.OutputConfig().setMaxConcepts(3);
    const asked = { inputBytes: picture, inputType: "image", inferenceParams: { temperature: "0.7" }, outputConfig };
    return ids(await digits().predictByBytes(asked));
  },
  "`inferenceParams` alone": async () => {
    const made = digits();
    await made.predictByBytes({ inputBytes: picture, inputType: "image", inferenceParams: { temperature: "0.7" } });
    return made.modelInfo.getModelVersion()?.getOutputInfo()?.getParams()?.toJavaScript() ?? "not sent";
  },
  "`availableMethods()`": () => digits().availableMethods(),
  "`methodSignatures()`": async () =>
    (await digits().methodSignatures())[0].inputFieldsList.map((field) => field.name),
  "`predict({ methodName, image: { base64 } })`": async () => returned(await digits().predict(byMethod())),
  "`predict({ methodName, image: { url } })`": async () =>
    returned(await digits().predict({ methodName: "predict", image: { url: `${web}/${names[0]}` } })),
  "`predict({ methodName, text: \"…\" })`": async () =>
    returned(await model(topicsUrl).predict({ methodName: "predict", text: text.toString() })),
  "`predict({ methodName, …, max_concepts })`": async () =>
    returned(await digits().predict(byMethod({ max_concepts: 2 }))),
  "`predict({ methodName, …, min_value })`": async () =>
    returned(await digits().predict(byMethod({ min_value: 0.6 }))),
  "`predict({ methodName, …, select_concepts: [\"4\", \"five\"] })`": async () =>
    returned(await digits().predict(byMethod({ select_concepts: ["4", "five"] }))),
  "`predict({ methodName, …, max_concepts: 201 })`": () => digits().predict(byMethod({ max_concepts: 201 })),
  "a whole number for a FLOAT argument, `min_value: 0`": () => digits().predict(byMethod({ min_value: 0 })),
  "a missing argument": () => digits().predict({ methodName: "predict" }),
  "an unknown argument": () => digits().predict(byMethod({ colour: "red" })),
  "an unknown method": () => digits().predict({ ...byMethod(), methodName: "analyze" }),
  "`Model.getOutputDataFromModelResponse(outputs)`": async () =>
    Model.getOutputDataFromModelResponse(await digits().predict(byMethod())).conceptsList.map((found) => found.id),
  "`generate({ methodName, … })`": async () => {
    const messages = [];
    for await (const outputs of digits().generate(byMethod())) messages.push(returned(outputs));
    return messages;
  },
  "`listVersions()`": async () => (await all(digits().listVersions())).map((found) => found.id),
  "`listVersions({ pageNo, perPage })`": async () =>
    (await all(digits().listVersions({ pageNo: 2, perPage: 1 }))).map((found) => found.id),
  "`App.listModels()`": async () => {
    const app = new App({ authConfig: { userId: "appliance", appId: "main", pat, ...here } });
    return (await all(app.listModels())).map((found) => found.id).sort();
  },
  "`App.listConcepts()`": async () => {
    const app = new App({ authConfig: { userId: "appliance", appId: "main", pat, ...here } });
    return `${(await all(app.listConcepts())).length} concepts`;
  },
};

console.log = () => {};
const found = {};
for (const [form, drive] of Object.entries(forms)) {
  if (only && form !== only) continue;
  try {
    found[form] = (await drive()) ?? "nothing";
  } catch (error) {
    found[form] = `${error.name}: ${error.message}`;
  }
}
process.stdout.write(JSON.stringify(found) + "\n", () => process.exit());

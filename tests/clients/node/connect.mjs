// The stock Node SDK before `appliance connect`: node connect.mjs BASE SAMPLES, the key in CLARIFAI_PAT.
// Prints a JSON object of what came back. Nothing here knows of a certificate.
import fs from "node:fs";
import path from "node:path";
import { Input, Model } from "clarifai-nodejs";

const [base, samples] = process.argv.slice(2);
const pat = process.env.CLARIFAI_PAT;
const names = fs.readdirSync(samples).filter((name) => name.endsWith(".png")).sort();
const pictures = names.map((name) => fs.readFileSync(path.join(samples, name)));
const model = (name, at = base) =>
  new Model({ url: `https://clarifai.com/appliance/main/models/${name}`, authConfig: { pat, base: at } });
const ids = (outputs, index = 0) => outputs[index].data.conceptsList.map((concept) => concept.id);
const image = (at) => Input.getInputFromBytes({ inputId: `input-${at}`, imageBytes: pictures[at % pictures.length] });
const byBytes = async (made) => ids(await made.predictByBytes({ inputBytes: pictures[0], inputType: "image" }));

const batch = await model("digits").predict({ inputs: Array.from({ length: 128 }, (_, at) => image(at)) });
const found = {
  truth: Array.from({ length: 128 }, (_, at) => names[at % names.length].match(/-(\d)\.png$/)[1]),
  batch: batch.map((_, at) => ids(batch, at)[0]),
  by_bytes: await byBytes(model("digits")),
  by_ip: await byBytes(model("digits", base.replace("localhost", "127.0.0.1"))),
  methods: await model("digits").availableMethods(),
  text: ids(
    await model("ml-topics").predictByBytes({
      inputBytes: Buffer.from("k-means clusters the samples into groups"),
      inputType: "text",
    }),
  )[0],
};
console.log(JSON.stringify(found));
process.exit(0);

"""What a user of the stock Clarifai SDK writes: only `base_url` and the root certificate differ from the cloud."""

import sys
from pathlib import Path

from clarifai.client.input import Inputs
from clarifai.client.model import Model
from clarifai.versions import CLIENT_VERSION

base_url, root_certificates_path = sys.argv[1:3]
pictures = sorted((Path(__file__).parent.parent / "models" / "digits" / "samples").glob("*.png"))[:16]

print(f"\nstock clarifai SDK {CLIENT_VERSION} → {base_url}\n")
model = Model(
    url="https://clarifai.com/appliance/main/models/digits",
    base_url=base_url,
    root_certificates_path=root_certificates_path,
)
inputs = [Inputs.get_input_from_bytes(input_id=path.stem, image_bytes=path.read_bytes()) for path in pictures]
reply = model.predict(inputs)

right = 0
for path, output in zip(pictures, reply.outputs, strict=True):
    best = output.data.concepts[0]
    truth = path.stem.rsplit("-", 1)[1]
    right += best.id == truth
    print(f"  {path.name:<28} → {best.name:<6} {best.value:.3f}   {'right' if best.id == truth else 'WRONG'}")
print(f"\n{right} of {len(pictures)} held-out digits right, in one request.")

topics = Model(
    url="https://clarifai.com/appliance/main/models/ml-topics",
    base_url=base_url,
    root_certificates_path=root_certificates_path,
)
text = "K-means assigns each sample to the nearest of k centroids."
concepts = topics.predict(text=text, max_concepts=2)
print(f'\n"{text}"\n  → ' + ", ".join(f"{concept.name} {concept.value:.3f}" for concept in concepts))

sys.exit(0 if right >= 0.9 * len(pictures) else 1)

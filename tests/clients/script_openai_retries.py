"""Runs inside an environment with the stock OpenAI client: more requests than a second may have. Prints JSON.

Usage: script_openai_retries.py BASE_URL ROOT_CERTIFICATE PAT
"""

import json
import ssl
import sys

import openai

base_url, root, pat = sys.argv[1:]
MODEL = "tester/tests/models/sentence"


def client(retries):
    """With so many retries; 2 is the client's own choice."""
    return openai.OpenAI(
        api_key=pat,
        base_url=f"{base_url}/v2/ext/openai/v1",
        max_retries=retries,
        http_client=openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=root)),
    )


with client(0) as impatient:
    refused = "never"
    for _ in range(50):  # on a busy machine two calls may be far apart
        try:
            impatient.embeddings.create(model=MODEL, input="good")
        except openai.RateLimitError as error:
            refused = {"code": error.code, "retry_after": error.response.headers["retry-after"]}
            break
with client(2) as patient:
    answered = [len(patient.embeddings.create(model=MODEL, input="good").data) for _ in range(2)]
print(json.dumps({"refused": refused, "answered": answered}))

<?php
// Clarifai's API from PHP, with messages generated from the protos, over Debian's php-curl:
// php forms.php BASE CA SAMPLES WEB STUBS, the key in CLARIFAI_PAT.
// Prints a JSON object: form → what came back, or the error that its user sees.

declare(strict_types=1);

use Clarifai\Api\Concept;
use Clarifai\Api\Data;
use Clarifai\Api\GetModelRequest;
use Clarifai\Api\Image;
use Clarifai\Api\Input;
use Clarifai\Api\ListModelsRequest;
use Clarifai\Api\Model;
use Clarifai\Api\ModelVersion;
use Clarifai\Api\MultiModelResponse;
use Clarifai\Api\MultiOutputResponse;
use Clarifai\Api\OutputConfig;
use Clarifai\Api\OutputInfo;
use Clarifai\Api\PostModelOutputsRequest;
use Clarifai\Api\SingleModelResponse;
use Clarifai\Api\Status\StatusCode;
use Clarifai\Api\Text;
use Clarifai\Api\UserAppIDSet;
use Google\Protobuf\Internal\Message;

[, $base, $ca, $samples, $web, $stubs] = $argv;
$key = getenv('CLARIFAI_PAT');
$paths = glob("$samples/*.png");
$pictures = array_map('file_get_contents', $paths);
const TEXT = 'Decision trees are grown on bootstrap samples and vote together.';

spl_autoload_register(function (string $class) use ($stubs): void {
    foreach ([$stubs, '/usr/share/php'] as $folder) {
        $file = $folder . '/' . strtr($class, '\\', '/') . '.php';
        if (is_file($file)) {
            require_once $file;
            return;
        }
    }
});

/** One HTTP request: status, headers and trailers, body. */
function http(string $path, ?string $body, array $headers, int $version = CURL_HTTP_VERSION_NONE): array
{
    global $base, $ca;
    static $curl = null;
    $curl ??= curl_init();
    curl_reset($curl);
    $received = [];
    curl_setopt_array($curl, [
        CURLOPT_URL => $base . $path,
        CURLOPT_CAINFO => $ca,
        CURLOPT_HTTP_VERSION => $version,
        CURLOPT_FRESH_CONNECT => $version === CURL_HTTP_VERSION_2TLS,
        CURLOPT_HTTPHEADER => $headers,
        CURLOPT_RETURNTRANSFER => true,
        CURLOPT_TIMEOUT => 60,
        CURLOPT_HEADERFUNCTION => function ($_, string $line) use (&$received): int {
            [$name, $value] = array_pad(explode(':', $line, 2), 2, '');
            $received[strtolower(trim($name))] = trim($value);
            return strlen($line);
        },
    ]);
    if ($body !== null) {
        curl_setopt($curl, CURLOPT_POSTFIELDS, $body);
    }
    $reply = curl_exec($curl);
    if ($reply === false) {
        throw new RuntimeException(curl_error($curl));
    }
    return [curl_getinfo($curl, CURLINFO_RESPONSE_CODE), $received, $reply];
}

/**
 * One call by gRPC-Web: the reply's messages. A frame is a byte, four bytes of length, and so much of a message; a byte
 * of 128 announces the trailers instead. Over HTTP/2 it may be gRPC itself, whose trailers are HTTP's.
 */
function grpc(string $method, Message $request, string $reply, ?string $as = null, bool $web = true): array
{
    global $key;
    $body = $request->serializeToString();
    $headers = ['authorization: Key ' . ($as ?? $key), 'content-type: application/grpc' . ($web ? '-web+proto' : '')];
    if (!$web) {
        $headers[] = 'te: trailers';
    }
    $version = $web ? CURL_HTTP_VERSION_1_1 : CURL_HTTP_VERSION_2TLS;
    [, $end, $bytes] = http("/clarifai.api.V2/$method", pack('CN', 0, strlen($body)) . $body, $headers, $version);
    $messages = [];
    for ($at = 0; $at < strlen($bytes); $at += 5 + $length) {
        ['kind' => $kind, 'length' => $length] = unpack('Ckind/Nlength', $bytes, $at);
        $content = substr($bytes, $at + 5, $length);
        if ($kind === 128) {
            preg_match_all('/^([^:]+):[ ]*(.*?)\r?$/m', $content, $lines);
            $end = array_combine($lines[1], $lines[2]);
            continue;
        }
        $messages[] = $message = new $reply();
        $message->mergeFromString($content);
    }
    if ($end['grpc-status'] !== '0') {
        throw new RuntimeException("gRPC {$end['grpc-status']}: " . rawurldecode($end['grpc-message']));
    }
    return $messages;
}

function image(int $index, string $id = ''): Input
{
    global $pictures;
    $image = new Image(['base64' => $pictures[$index % count($pictures)]]);
    return new Input(['id' => $id, 'data' => new Data(['image' => $image])]);
}

function request(array $inputs, array $more = []): PostModelOutputsRequest
{
    $owner = new UserAppIDSet(['user_id' => 'appliance', 'app_id' => 'main']);
    return new PostModelOutputsRequest($more + ['user_app_id' => $owner, 'model_id' => 'digits', 'inputs' => $inputs]);
}

function limited(array $config): PostModelOutputsRequest
{
    $info = new OutputInfo(['output_config' => new OutputConfig($config)]);
    return request([image(0)], ['model' => new Model(['model_version' => new ModelVersion(['output_info' => $info])])]);
}

/** As documented: what is not SUCCESS is an error. */
function post(PostModelOutputsRequest $request, ?string $as = null): MultiOutputResponse
{
    [$response] = grpc('PostModelOutputs', $request, MultiOutputResponse::class, $as);
    $status = $response->getStatus();
    if ($status->getCode() !== StatusCode::SUCCESS) {
        throw new RuntimeException(StatusCode::name($status->getCode()) . ': ' . $status->getDetails());
    }
    return $response;
}

function ids(MultiOutputResponse $response, int $index = 0): array
{
    $concepts = iterator_to_array($response->getOutputs()[$index]->getData()->getConcepts());
    return array_map(fn (Concept $concept): string => $concept->getId(), $concepts);
}

function batch(int $count): PostModelOutputsRequest
{
    return request(array_map(fn (int $index): Input => image($index, "demo_$index"), range(0, $count - 1)));
}

/** Every class that protoc made is one that PHP can load; which are not. */
function unloadable(string $stubs): array
{
    $bad = [];
    foreach (new RecursiveIteratorIterator(new RecursiveDirectoryIterator($stubs)) as $file) {
        $class = strtr(substr((string) $file, strlen($stubs) + 1, -4), '/', '\\');
        if (!str_ends_with((string) $file, '.php') || str_starts_with($class, 'GPBMetadata')) {
            continue;
        }
        try {
            class_exists($class);
        } catch (Error $error) {
            $bad[] = "$class: {$error->getMessage()}";
        }
    }
    return $bad;
}

$forms = [
    'the messages that `protoc --php_out` makes' => fn () => unloadable($stubs),
    'the extension `grpc`' => fn () => extension_loaded('grpc') ? 'loaded' : 'not loaded',
    '`PostModelOutputs`, `image.base64`' => fn () => ids(post(request([image(0)]))),
    '`PostModelOutputs`, `image.url`' => function () use ($web, $paths) {
        $image = new Image(['url' => "$web/" . basename($paths[0])]);
        return ids(post(request([new Input(['data' => new Data(['image' => $image])])])));
    },
    '`PostModelOutputs`, `text.raw`' => function () {
        $input = new Input(['data' => new Data(['text' => new Text(['raw' => TEXT])])]);
        return ids(post(request([$input], ['model_id' => 'ml-topics'])));
    },
    '`version_id`' => fn () => ids(post(request([image(0)], ['version_id' => '1']))),
    '`model.output_info.output_config`, as documented' => function () {
        $info = new OutputInfo(['output_config' => new OutputConfig(['max_concepts' => 3])]);
        return ids(post(request([image(0)], ['model' => new Model(['output_info' => $info])])));
    },
    '`model.model_version.output_info.output_config`' => fn () => ids(post(limited(['max_concepts' => 3]))),
    '`min_value`' => fn () => ids(post(limited(['min_value' => 0.6]))),
    '`select_concepts`' => fn () => ids(post(limited([
        'select_concepts' => [new Concept(['id' => '4']), new Concept(['name' => 'five'])],
    ]))),
    '`max_concepts` 201' => fn () => ids(post(limited(['max_concepts' => 201]))),
    'a batch of 128' => function () {
        $response = post(batch(128));
        $outputs = iterator_to_array($response->getOutputs());
        return array_map(
            fn ($output): array => [$output->getInput()->getId(), $output->getData()->getConcepts()[0]->getId()],
            $outputs,
        );
    },
    'a batch of 129' => fn () => ids(post(batch(129))),
    '`GenerateModelOutputs`' => fn () => array_map(
        fn (MultiOutputResponse $message): array => ids($message),
        grpc('GenerateModelOutputs', request([image(0)]), MultiOutputResponse::class),
    ),
    'gRPC over HTTP/2, by php-curl' => fn () => ids(
        grpc('PostModelOutputs', request([image(0)]), MultiOutputResponse::class, web: false)[0],
    ),
    'an RPC that is not served' => fn () => grpc('ListInputs', new ListModelsRequest(), MultiModelResponse::class),
    '`GetModel`' => function () {
        $asked = new GetModelRequest(['user_app_id' => request([])->getUserAppId(), 'model_id' => 'digits']);
        [$response] = grpc('GetModel', $asked, SingleModelResponse::class);
        return $response->getModel()->getModelVersion()->getId();
    },
    '`ListModels`' => function () {
        $asked = new ListModelsRequest(['user_app_id' => request([])->getUserAppId()]);
        [$response] = grpc('ListModels', $asked, MultiModelResponse::class);
        $found = array_map(fn (Model $model): string => $model->getId(), iterator_to_array($response->getModels()));
        sort($found);
        return $found;
    },
    'a wrong PAT' => fn () => ids(post(request([image(0)]), str_repeat('0', 64))),
    'an unknown model' => fn () => ids(post(request([image(0)], ['model_id' => 'nothing']))),
    'without the root certificate' => function () use ($stubs, &$ca) {
        [$kept, $ca] = [$ca, '/etc/ssl/certs/ca-certificates.crt'];
        try {
            return ids(post(request([image(0)])));
        } finally {
            $ca = $kept;
        }
    },
];

$found = [];
foreach ($forms as $form => $drive) {
    try {
        $found[$form] = $drive();
    } catch (Throwable $error) {
        $found[$form] = get_class($error) . ': ' . $error->getMessage();
    }
}
echo json_encode($found, JSON_THROW_ON_ERROR), "\n";

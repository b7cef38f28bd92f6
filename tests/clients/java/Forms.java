// Every form of Clarifai's API from Java, with stubs generated from the protos and Debian's grpc-java:
// Forms HOST PORT CA SAMPLES WEB OTHER_PORT CLIENT_KEY CLIENT_CERTIFICATE STOCK_HOST NOBODYS_HOST, the key in CLARIFAI_PAT.
// Prints a JSON object: form → what came back, or the error that its user sees.

import com.clarifai.grpc.api.*;
import com.clarifai.grpc.api.status.StatusCode;
import com.google.protobuf.ByteString;
import com.google.protobuf.Struct;
import com.google.protobuf.Value;
import io.grpc.CallCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.netty.GrpcSslContexts;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.stub.MetadataUtils;
import io.grpc.stub.StreamObserver;
import io.netty.handler.ssl.SslContextBuilder;
import io.netty.handler.ssl.util.InsecureTrustManagerFactory;
import java.io.File;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Executor;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;

public class Forms {
  static final Metadata.Key<String> AUTHORIZATION = Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
  static final String TEXT = "Decision trees are grown on bootstrap samples and vote together.";
  static final UserAppIDSet OWNER = UserAppIDSet.newBuilder().setUserId("appliance").setAppId("main").build();

  /** The key of every call, as the documentation's `withCallCredentials` has it. */
  static final class Key extends CallCredentials {
    private final String key;

    Key(String key) {
      this.key = key;
    }

    @Override
    public void applyRequestMetadata(RequestInfo info, Executor executor, MetadataApplier applier) {
      Metadata headers = new Metadata();
      headers.put(AUTHORIZATION, "Key " + key);
      applier.apply(headers);
    }

    @Override
    public void thisUsesUnstableApi() {}
  }

  static List<ByteString> pictures;

  static ManagedChannel channel(String host, int port, SslContextBuilder tls) throws Exception {
    return NettyChannelBuilder.forAddress(host, port).sslContext(tls.build()).build();
  }

  /** What the stock package's channel is: this port, and whoever answers. */
  static ManagedChannel stockChannel(String base) throws Exception {
    return channel(base, 443, GrpcSslContexts.forClient().trustManager(InsecureTrustManagerFactory.INSTANCE));
  }

  static Input image(int index, String id) {
    Image image = Image.newBuilder().setBase64(pictures.get(index % pictures.size())).build();
    return Input.newBuilder().setId(id).setData(Data.newBuilder().setImage(image)).build();
  }

  static PostModelOutputsRequest.Builder request(Input... inputs) {
    return PostModelOutputsRequest.newBuilder()
        .setUserAppId(OWNER)
        .setModelId("digits")
        .addAllInputs(List.of(inputs));
  }

  static PostModelOutputsRequest batch(int count) {
    PostModelOutputsRequest.Builder request = request();
    for (int index = 0; index < count; index++) request.addInputs(image(index, "demo_" + index));
    return request.build();
  }

  static PostModelOutputsRequest limited(OutputConfig.Builder config) {
    OutputInfo info = OutputInfo.newBuilder().setOutputConfig(config).build();
    return request(image(0, ""))
        .setModel(Model.newBuilder().setModelVersion(ModelVersion.newBuilder().setOutputInfo(info)))
        .build();
  }

  // As documented: what is not SUCCESS is an error.
  static List<String> ids(MultiOutputResponse response) {
    if (response.getStatus().getCode() != StatusCode.SUCCESS) {
      throw new RuntimeException(response.getStatus().getCode() + ": " + response.getStatus().getDetails());
    }
    return ids(response.getOutputs(0).getData());
  }

  static List<String> ids(Data data) {
    return data.getConceptsList().stream().map(Concept::getId).collect(Collectors.toList());
  }

  static List<Object> heard(V2Grpc.V2Stub stub, PostModelOutputsRequest... requests) throws Exception {
    List<Object> messages = new ArrayList<>();
    CompletableFuture<List<Object>> end = new CompletableFuture<>();
    StreamObserver<PostModelOutputsRequest> asked =
        stub.streamModelOutputs(
            new StreamObserver<>() {
              @Override
              public void onNext(MultiOutputResponse response) {
                messages.add(ids(response));
              }

              @Override
              public void onError(Throwable error) {
                end.completeExceptionally(error);
              }

              @Override
              public void onCompleted() {
                end.complete(messages);
              }
            });
    for (PostModelOutputsRequest request : requests) asked.onNext(request);
    asked.onCompleted();
    return end.get(60, TimeUnit.SECONDS);
  }

  public static void main(String[] words) throws Exception {
    String host = words[0], web = words[4], pat = System.getenv("CLARIFAI_PAT");
    int port = Integer.parseInt(words[1]), otherPort = Integer.parseInt(words[5]);
    File ca = new File(words[2]);
    List<Path> paths;
    try (var found = Files.list(Path.of(words[3]))) {
      paths = found.filter(path -> path.toString().endsWith(".png")).sorted().collect(Collectors.toList());
    }
    pictures = new ArrayList<>();
    for (Path path : paths) pictures.add(ByteString.copyFrom(Files.readAllBytes(path)));

    List<ManagedChannel> open = new ArrayList<>();
    ManagedChannel channel = channel(host, port, GrpcSslContexts.forClient().trustManager(ca));
    open.add(channel);
    V2Grpc.V2BlockingStub plain = V2Grpc.newBlockingStub(channel);
    V2Grpc.V2BlockingStub stub = plain.withCallCredentials(new Key(pat));
    V2Grpc.V2Stub async = V2Grpc.newStub(channel).withCallCredentials(new Key(pat));
    PostModelOutputsRequest one = request(image(0, "")).build();
    Map<String, Callable<Object>> forms = new LinkedHashMap<>();

    forms.put("`GrpcSslContexts.forClient().trustManager(ca)`", () -> ids(stub.postModelOutputs(one)));
    forms.put("`withCallCredentials(…)`", () -> ids(stub.postModelOutputs(one)));
    forms.put(
        "`MetadataUtils.newAttachHeadersInterceptor(…)`",
        () -> {
          Metadata headers = new Metadata();
          headers.put(AUTHORIZATION, "Key " + pat);
          return ids(
              plain.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers)).postModelOutputs(one));
        });
    forms.put(
        "`V2Grpc.newFutureStub`",
        () -> {
          var future = V2Grpc.newFutureStub(channel).withCallCredentials(new Key(pat));
          return ids(future.postModelOutputs(one).get(60, TimeUnit.SECONDS));
        });
    forms.put("`PostModelOutputs`, `image.base64`", () -> ids(stub.postModelOutputs(one)));
    forms.put(
        "`PostModelOutputs`, `image.url`",
        () -> {
          Image image = Image.newBuilder().setUrl(web + "/" + paths.get(0).getFileName()).build();
          Input input = Input.newBuilder().setData(Data.newBuilder().setImage(image)).build();
          return ids(stub.postModelOutputs(request(input).build()));
        });
    forms.put(
        "`PostModelOutputs`, `text.raw`",
        () -> {
          Data data = Data.newBuilder().setText(Text.newBuilder().setRaw(TEXT)).build();
          Input input = Input.newBuilder().setData(data).build();
          return ids(stub.postModelOutputs(request(input).setModelId("ml-topics").build()));
        });
    forms.put(
        "`setVersionId`", () -> ids(stub.postModelOutputs(one.toBuilder().setVersionId("1").build())));
    forms.put(
        "`model.output_info.output_config`, as documented",
        () -> {
          OutputInfo info =
              OutputInfo.newBuilder().setOutputConfig(OutputConfig.newBuilder().setMaxConcepts(3)).build();
          return ids(stub.postModelOutputs(one.toBuilder().setModel(Model.newBuilder().setOutputInfo(info)).build()));
        });
    forms.put(
        "`model.model_version.output_info.output_config`",
        () -> ids(stub.postModelOutputs(limited(OutputConfig.newBuilder().setMaxConcepts(3)))));
    forms.put(
        "`setMinValue`", () -> ids(stub.postModelOutputs(limited(OutputConfig.newBuilder().setMinValue(0.6f)))));
    forms.put(
        "`addSelectConcepts`",
        () -> {
          OutputConfig.Builder config = OutputConfig.newBuilder();
          config.addSelectConcepts(Concept.newBuilder().setId("4"));
          config.addSelectConcepts(Concept.newBuilder().setName("five"));
          return ids(stub.postModelOutputs(limited(config)));
        });
    forms.put(
        "`setMaxConcepts(201)`",
        () -> ids(stub.postModelOutputs(limited(OutputConfig.newBuilder().setMaxConcepts(201)))));
    forms.put(
        "a batch of 128",
        () -> {
          List<Object> found = new ArrayList<>();
          for (Output output : stub.postModelOutputs(batch(128)).getOutputsList()) {
            found.add(List.of(output.getInput().getId(), output.getData().getConcepts(0).getId()));
          }
          return found;
        });
    forms.put("a batch of 129", () -> ids(stub.postModelOutputs(batch(129))));
    forms.put(
        "a method's arguments as parts",
        () -> {
          Value name = Value.newBuilder().setStringValue("predict").build();
          Data.Builder data = Data.newBuilder();
          data.setMetadata(Struct.newBuilder().putFields("_method_name", name));
          data.addParts(Part.newBuilder().setId("image").setData(image(0, "").getData()));
          data.addParts(Part.newBuilder().setId("max_concepts").setData(Data.newBuilder().setIntValue(2)));
          Input input = Input.newBuilder().setData(data).build();
          MultiOutputResponse response = stub.postModelOutputs(request(input).build());
          return ids(response.getOutputs(0).getData().getParts(0).getData());
        });
    forms.put(
        "`GenerateModelOutputs`",
        () -> {
          List<Object> messages = new ArrayList<>();
          Iterator<MultiOutputResponse> responses = stub.generateModelOutputs(one);
          while (responses.hasNext()) messages.add(ids(responses.next()));
          return messages;
        });
    forms.put("`StreamModelOutputs`", () -> heard(async, one, one));
    forms.put(
        "`GetModel`",
        () -> {
          GetModelRequest asked = GetModelRequest.newBuilder().setUserAppId(OWNER).setModelId("digits").build();
          return stub.getModel(asked).getModel().getModelVersion().getId();
        });
    forms.put(
        "`ListModels`",
        () -> {
          ListModelsRequest asked = ListModelsRequest.newBuilder().setUserAppId(OWNER).build();
          return stub.listModels(asked).getModelsList().stream().map(Model::getId).sorted().collect(Collectors.toList());
        });
    forms.put(
        "`ListModelConcepts`",
        () -> {
          ListModelConceptsRequest asked =
              ListModelConceptsRequest.newBuilder().setUserAppId(OWNER).setModelId("digits").build();
          return "" + stub.listModelConcepts(asked).getConceptsCount() + " concepts";
        });
    forms.put(
        "a wrong PAT",
        () -> ids(plain.withCallCredentials(new Key("0".repeat(64))).postModelOutputs(one)));
    forms.put("no PAT", () -> ids(plain.postModelOutputs(one)));
    forms.put(
        "an unknown model", () -> ids(stub.postModelOutputs(one.toBuilder().setModelId("nothing").build())));
    forms.put(
        "a client certificate: `keyManager(certificate, key)`",
        () -> {
          SslContextBuilder tls = GrpcSslContexts.forClient().trustManager(ca);
          tls.keyManager(new File(words[7]), new File(words[6]));
          ManagedChannel certified = channel(host, otherPort, tls);
          open.add(certified);
          return ids(V2Grpc.newBlockingStub(certified).postModelOutputs(one));
        });
    forms.put(
        "without a client certificate, where one is needed",
        () -> {
          ManagedChannel uncertified = channel(host, otherPort, GrpcSslContexts.forClient().trustManager(ca));
          open.add(uncertified);
          return ids(V2Grpc.newBlockingStub(uncertified).withCallCredentials(new Key(pat)).postModelOutputs(one));
        });
    forms.put(
        "the JVM's own trust store",
        () -> {
          ManagedChannel untrusting = channel(host, port, GrpcSslContexts.forClient());
          open.add(untrusting);
          return ids(V2Grpc.newBlockingStub(untrusting).withCallCredentials(new Key(pat)).postModelOutputs(one));
        });
    forms.put(
        "the stock channel's trust",
        () -> {
          ManagedChannel stock = stockChannel(words[8]);
          open.add(stock);
          return ids(V2Grpc.newBlockingStub(stock).withCallCredentials(new Key(pat)).postModelOutputs(one));
        });
    forms.put(
        "the certificate's name, where it is verified",
        () -> {
          ManagedChannel verifying = channel(words[8], 443, GrpcSslContexts.forClient().trustManager(ca));
          open.add(verifying);
          return ids(V2Grpc.newBlockingStub(verifying).withCallCredentials(new Key(pat)).postModelOutputs(one));
        });
    forms.put(
        "the stock channel's port",
        () -> {
          ManagedChannel stock = stockChannel(words[9]);
          open.add(stock);
          return ids(V2Grpc.newBlockingStub(stock).withCallCredentials(new Key(pat)).postModelOutputs(one));
        });
    forms.put("the stock channel with another port", () -> stockChannel(host + ":" + port).authority());

    List<String> lines = new ArrayList<>();
    for (Map.Entry<String, Callable<Object>> form : forms.entrySet()) {
      Object found;
      try {
        found = form.getValue().call();
      } catch (Exception error) {
        StringBuilder said = new StringBuilder();
        for (Throwable cause = error; cause != null; cause = cause.getCause()) said.append(cause).append("; ");
        found = said.toString();
      }
      lines.add(json(form.getKey()) + ": " + json(found));
    }
    System.out.println("{" + String.join(", ", lines) + "}");
    for (ManagedChannel each : open) each.shutdownNow();
    System.exit(0);
  }

  static String json(Object value) {
    if (value instanceof List<?> list) {
      return list.stream().map(Forms::json).collect(Collectors.joining(", ", "[", "]"));
    }
    StringBuilder text = new StringBuilder("\"");
    for (char letter : value.toString().toCharArray()) {
      if (letter == '"' || letter == '\\') text.append('\\').append(letter);
      else if (letter < ' ') text.append(String.format("\\u%04x", (int) letter));
      else text.append(letter);
    }
    return text.append('"').toString();
  }
}

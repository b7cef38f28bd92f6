// The C++ gRPC server that the benchmark compares with: bytes in, bytes out, one completion queue, one thread.
//
//   echo FOLDER
//
// FOLDER holds the replies and certificates that bench/wire/workload.py and certificates.py wrote. The server listens on
// three ports of loopback, writes {"plain": port, "tls": port, "mtls": port} as one line, and serves until it is killed.
// The methods are those of workload.py: /bench.Wire/One and /bench.Wire/Batch answer bytes that were made before,
// /bench.Wire/Predict parses the request and builds the reply.

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "predict.pb.h"

namespace {

constexpr int kConcepts = 20;
constexpr int kSuccess = 10000;
constexpr int kWaitingCalls = 256;  // offered to the completion queue, so that a burst needs no turn of the loop each

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::cerr << "echo: cannot read " << path << "\n";
    exit(1);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

grpc::ByteBuffer ReadReply(const std::string& path) {
  grpc::Slice slice(ReadFile(path));
  return {&slice, 1};
}

void SetSuccess(bench::Status* status) {
  status->set_code(kSuccess);
  status->set_description("Ok");
}

// The work of workload.answer: 20 concepts for each input, with values that depend on the input's length.
bool Answer(grpc::ByteBuffer* body, grpc::ByteBuffer* reply) {
  google::protobuf::Arena arena;
  auto* request = google::protobuf::Arena::CreateMessage<bench::PostModelOutputsRequest>(&arena);
  auto* response = google::protobuf::Arena::CreateMessage<bench::MultiOutputResponse>(&arena);
  if (!grpc::SerializationTraits<google::protobuf::Message>::Deserialize(body, request).ok()) return false;
  SetSuccess(response->mutable_status());
  for (const bench::Input& input : request->inputs()) {
    const size_t length = input.data().has_text() ? input.data().text().raw().size()
                                                  : input.data().image().base64().size();
    bench::Output* output = response->add_outputs();
    SetSuccess(output->mutable_status());
    for (int rank = 0; rank < kConcepts; ++rank) {
      bench::Concept* concept_ = output->mutable_data()->add_concepts();
      const std::string digits{static_cast<char>('0' + rank / 10), static_cast<char>('0' + rank % 10)};
      concept_->set_id("concept-" + digits);
      concept_->set_name("what the model sees here " + digits);
      concept_->set_value(static_cast<float>(length % 97 + 1) / static_cast<float>(100 * (rank + 1)));
    }
  }
  bool own_buffer;
  return grpc::SerializationTraits<google::protobuf::Message>::Serialize(*response, reply, &own_buffer).ok();
}

struct Server {
  grpc::AsyncGenericService service;
  std::unique_ptr<grpc::ServerCompletionQueue> queue;
  grpc::ByteBuffer one, batch;
};

// One call, from the wait for it to its end; deletes itself then.
class Call {
 public:
  explicit Call(Server* server) : server_(server), stream_(&context_) {
    server_->service.RequestCall(&context_, &stream_, server_->queue.get(), server_->queue.get(), this);
  }

  // What was waited for has happened, or failed because the client is gone.
  void Proceed(bool ok) {
    switch (state_) {
      case State::kWaiting:
        new Call(server_);  // takes this one's place
        state_ = State::kReading;
        stream_.Read(&body_, this);
        break;
      case State::kReading:
        state_ = State::kAnswering;
        if (ok) {
          Reply();
        } else {
          Fail(grpc::StatusCode::INVALID_ARGUMENT, "no message");
        }
        break;
      case State::kAnswering:
        delete this;
    }
  }

 private:
  enum class State { kWaiting, kReading, kAnswering };

  void Reply() {
    const std::string& method = context_.method();
    if (method == "/bench.Wire/One") {
      Send(server_->one);
    } else if (method == "/bench.Wire/Batch") {
      Send(server_->batch);
    } else if (method != "/bench.Wire/Predict") {
      Fail(grpc::StatusCode::UNIMPLEMENTED, "unknown method");
    } else if (grpc::ByteBuffer reply; Answer(&body_, &reply)) {
      Send(reply);
    } else {
      Fail(grpc::StatusCode::INVALID_ARGUMENT, "the request cannot be parsed");
    }
  }

  void Send(const grpc::ByteBuffer& reply) {
    stream_.WriteAndFinish(reply, grpc::WriteOptions(), grpc::Status::OK, this);
  }

  void Fail(grpc::StatusCode code, const char* why) { stream_.Finish(grpc::Status(code, why), this); }

  Server* server_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_;
  grpc::ByteBuffer body_;
  State state_ = State::kWaiting;
};

std::shared_ptr<grpc::ServerCredentials> Tls(const std::string& folder, bool ask_client) {
  grpc::SslServerCredentialsOptions options(ask_client ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                                       : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  options.pem_key_cert_pairs.push_back({ReadFile(folder + "/server.key"), ReadFile(folder + "/server.crt")});
  if (ask_client) options.pem_root_certs = ReadFile(folder + "/ca.crt");
  return grpc::SslServerCredentials(options);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: echo FOLDER\n";
    return 2;
  }
  const std::string folder = arguments[1];
  Server server;
  server.one = ReadReply(folder + "/one.reply");
  server.batch = ReadReply(folder + "/batch.reply");

  grpc::ServerBuilder builder;
  int plain = 0, tls = 0, mtls = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &plain);
  builder.AddListeningPort("127.0.0.1:0", Tls(folder, false), &tls);
  builder.AddListeningPort("127.0.0.1:0", Tls(folder, true), &mtls);
  builder.RegisterAsyncGenericService(&server.service);
  server.queue = builder.AddCompletionQueue();
  const std::unique_ptr<grpc::Server> running = builder.BuildAndStart();
  if (!running || !plain || !tls || !mtls) {
    std::cerr << "echo: cannot listen\n";
    return 1;
  }
  std::cout << "{\"plain\": " << plain << ", \"tls\": " << tls << ", \"mtls\": " << mtls << "}" << std::endl;

  for (int call = 0; call < kWaitingCalls; ++call) new Call(&server);
  void* tag;
  bool ok;
  while (server.queue->Next(&tag, &ok)) static_cast<Call*>(tag)->Proceed(ok);
}

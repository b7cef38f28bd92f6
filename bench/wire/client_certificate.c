// Gives h2load a client certificate, for which it has no option: preloaded, it follows each SSL_CTX_new of the program
// and loads the certificate and key named by BENCH_CERTIFICATE and BENCH_KEY (PEM files) into the new context.
//
//   LD_PRELOAD=client_certificate.so BENCH_CERTIFICATE=client.crt BENCH_KEY=client.key h2load …
//
// The declarations are OpenSSL's own (SSL_CTX_new(3), SSL_CTX_use_certificate(3)), so that its headers are not needed.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#define PEM 1  // SSL_FILETYPE_PEM

extern int SSL_CTX_use_certificate_chain_file(void *context, const char *file);
extern int SSL_CTX_use_PrivateKey_file(void *context, const char *file, int type);

void *SSL_CTX_new(const void *method) {
  void *(*real)(const void *) = (void *(*)(const void *))dlsym(RTLD_NEXT, "SSL_CTX_new");
  void *context = real ? real(method) : NULL;
  const char *certificate = getenv("BENCH_CERTIFICATE"), *key = getenv("BENCH_KEY");
  if (context == NULL || certificate == NULL || key == NULL) return context;
  if (SSL_CTX_use_certificate_chain_file(context, certificate) != 1 || SSL_CTX_use_PrivateKey_file(context, key, PEM) != 1) {
    fprintf(stderr, "client_certificate: %s or %s cannot be loaded\n", certificate, key);
    exit(1);
  }
  return context;
}

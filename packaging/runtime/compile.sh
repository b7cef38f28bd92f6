#!/bin/bash
# Compiles the runtime: CPython with everything it needs linked in statically, and libnghttp2 for our own wire.
# Runs inside the old root (in-root.sh), without a network. /sources: files of sources.lock; /scripts: this folder.
# Leaves /out/runtime.tar with
#   python/     what is shipped as /usr/lib/inference-appliance/python
#   sdk/        what our own native part is compiled with: Python's headers, libnghttp2
#   licenses/   a folder a component
# The same sources in the same root give the same bytes.
set -euo pipefail
umask 022

case $ARCHITECTURE in
  amd64) openssl_target=linux-x86_64 ;;
  arm64) openssl_target=linux-aarch64 ;;
  *) echo "compile.sh knows amd64 and arm64, not $ARCHITECTURE" >&2; exit 1 ;;
esac

prefix=/usr/lib/inference-appliance/python
jobs=-j$(nproc)
mkdir -p /build /deps/lib /deps/include /licenses
cd /build
harden="-fPIC -fstack-protector-strong -D_FORTIFY_SOURCE=2 -ffile-prefix-map=/build=."
# Libraries; CPython chooses its own optimisation.
export CFLAGS="-O2 $harden"

step() { date -u "+%T $*"; }

# unpack COMPONENT [PATCHES]: the upstream source and those of Debian's patches whose names match PATCHES (default: all),
# into /build/COMPONENT, and its license files into /licenses/COMPONENT.
unpack() {
  local component=$1 wanted=${2:-.} patch
  step "$component"
  mkdir -p "$component" "/licenses/$component"
  tar xf /sources/"$component"_*.orig.tar.?z* -C "$component" --strip-components=1
  cd "$component"
  if ls /sources/"$component"_*.debian.tar.* >/dev/null 2>&1; then
    mkdir /build/"$component.debian"
    tar xf /sources/"$component"_*.debian.tar.* -C /build/"$component.debian" --strip-components=1
    if [ -e "/build/$component.debian/patches/series" ]; then
      grep -vE '^(#|$)' "/build/$component.debian/patches/series" | grep -E "$wanted" > "/build/$component.patches" || :
      while read -r patch _; do
        patch -sfp1 < "/build/$component.debian/patches/$patch" \
          || { echo "$component: Debian's patch $patch does not apply" >&2; exit 1; }
      done < "/build/$component.patches"
    fi
    cp "/build/$component.debian/copyright" "/licenses/$component/copyright"
  fi
  find . -maxdepth 2 -type f \( -iname 'LICEN[SC]E*' -o -iname 'COPYING*' \) ! -name '*.sh' -exec cp {} "/licenses/$component/" \;
}

# libffi asks for a newer autoconf than the old root has.
unpack autoconf
./configure -q --prefix=/usr/local
make -s $jobs >/dev/null 2>&1
make -s install >/dev/null
rm -r /licenses/autoconf
cd ..

unpack zlib
./configure --static --prefix=/deps >/dev/null
make -s $jobs libz.a
install -m644 libz.a /deps/lib/
install -m644 zlib.h zconf.h /deps/include/
cd ..

unpack bzip2
make -s $jobs CC=gcc CFLAGS="$CFLAGS -D_FILE_OFFSET_BITS=64" libbz2.a >/dev/null
install -m644 libbz2.a /deps/lib/
install -m644 bzlib.h /deps/include/
cd ..

unpack xz-utils
./configure -q --prefix=/deps --disable-shared --with-pic --disable-xz --disable-xzdec --disable-lzmadec \
  --disable-lzmainfo --disable-scripts --disable-doc --disable-nls
make -s $jobs
make -s install
cd ..

unpack libffi
autoreconf -fi >/tmp/log 2>&1 || { cat /tmp/log >&2; exit 1; }
./configure -q --prefix=/deps --libdir=/deps/lib --disable-shared --with-pic --disable-docs --disable-multi-os-directory
make -s $jobs >/dev/null
make -s install
cd ..

unpack expat
# Its own repository has the library one folder down.
cd expat
autoreconf -fi >/tmp/log 2>&1 || { cat /tmp/log >&2; exit 1; }
./configure -q --prefix=/deps --disable-shared --with-pic --without-docbook --without-examples --without-tests --without-xmlwf
make -s $jobs >/dev/null
make -s install >/dev/null
cd ../..

unpack sqlite3
./configure -q --disable-tcl --disable-readline --disable-shared >/dev/null
make -s sqlite3.c sqlite3.h >/dev/null
# What Python's sqlite3 module and Debian's build have in common, and nothing that loads code.
gcc $CFLAGS -DSQLITE_THREADSAFE=1 -DSQLITE_ENABLE_FTS5 -DSQLITE_ENABLE_RTREE -DSQLITE_ENABLE_MATH_FUNCTIONS \
  -DSQLITE_ENABLE_COLUMN_METADATA -DSQLITE_OMIT_LOAD_EXTENSION -DSQLITE_SECURE_DELETE -c sqlite3.c -o sqlite3.o
ar rcsD /deps/lib/libsqlite3.a sqlite3.o
install -m644 sqlite3.h /deps/include/
cd ..

unpack nghttp2
./configure -q --prefix=/deps --enable-lib-only --disable-shared --with-pic >/dev/null
make -s $jobs -C lib >/dev/null
make -s -C lib install >/dev/null
cd ..

unpack openssl
# TLS over TCP with today's algorithms: no code that is loaded at run time, no other protocols, none of the algorithms that
# no certificate has. Faults are found in those too. Certificates that the machine trusts are in their usual place.
./Configure $openssl_target no-shared no-tests no-docs no-apps no-legacy no-engine no-dso no-module no-ssl3 no-comp \
  no-cmp no-cms no-dtls no-quic no-srp no-srtp no-ts no-aria no-bf no-camellia no-cast no-ec2m no-gost no-idea no-md4 \
  no-mdc2 no-ocb no-rc2 no-rc4 no-rmd160 no-seed no-siv no-slh-dsa no-sm2 no-sm3 no-sm4 no-whirlpool \
  --prefix=/deps --libdir=lib --openssldir=/etc/ssl $CFLAGS >/dev/null
make -s $jobs build_sw >/dev/null
make -s install_dev >/dev/null
cd ..

# Of Debian's patches those that mend faults; the others fit Python into Debian's own folders.
unpack python3.13 '^(CVE-|ssl-|dict-use|traverse-)'
# Symbols of what is linked in stay inside: another module may bring another OpenSSL.
hidden=$(cd /deps/lib && ls -- *.a | paste -sd:)
# Python's own modules are in the program: it starts faster, and OpenSSL is there once.
env MODULE_BUILDTYPE=static CFLAGS="$harden" OPT="-DNDEBUG -fwrapv -O3 -Wall" ./configure -q --prefix=$prefix --with-openssl=/deps --with-system-expat \
  --without-ensurepip --disable-test-modules --without-static-libpython --without-readline --with-computed-gotos \
  CPPFLAGS="-I/deps/include" LDFLAGS="-L/deps/lib -Wl,-z,relro,-z,now -Wl,--exclude-libs,$hidden" \
  PKG_CONFIG_PATH=/deps/lib/pkgconfig PKG_CONFIG="pkg-config --static" \
  LIBEXPAT_LDFLAGS="-lexpat -lm" LIBSQLITE3_CFLAGS=-I/deps/include LIBSQLITE3_LIBS="-lsqlite3 -lm -lpthread" \
  BZIP2_CFLAGS=-I/deps/include BZIP2_LIBS=-lbz2 ZLIB_CFLAGS=-I/deps/include ZLIB_LIBS=-lz \
  py_cv_module__tkinter=n/a py_cv_module__curses=n/a py_cv_module__curses_panel=n/a py_cv_module_readline=n/a \
  py_cv_module__dbm=n/a py_cv_module__gdbm=n/a py_cv_module_nis=n/a py_cv_module__uuid=n/a
make -s $jobs
make -s install >/dev/null
cd ..

step "what is shipped"
mkdir -p /tree/sdk/lib /tree/licenses
cp -a $prefix/include/python3.13 /tree/sdk/include
cp -a /deps/include/nghttp2 /tree/sdk/include/
install -m644 /deps/lib/libnghttp2.a /tree/sdk/lib/
cd $prefix
rm -rf include share lib/pkgconfig lib/python3.13/{test,idlelib,turtledemo,lib2to3,tkinter,ensurepip,pydoc_data} \
  lib/python3.13/config-* lib/python3.13/turtle.py bin/{idle3*,pydoc3*,2to3*,python3*-config}
# Bytecode is made when the packages are staged, of everything in one way.
find . -name __pycache__ -prune -exec rm -rf {} +
strip --strip-unneeded bin/python3.13
bin/python3.13 -IB -c '
import asyncio, bz2, ctypes, decimal, hashlib, lzma, multiprocessing, sqlite3, ssl, xml.parsers.expat, zlib
callback = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 7)
assert callback() == 7
print(ssl.OPENSSL_VERSION, "sqlite", sqlite3.sqlite_version, xml.parsers.expat.EXPAT_VERSION, "zlib", zlib.ZLIB_RUNTIME_VERSION)'
cd /
cp -a $prefix /tree/python
cp -a /licenses/. /tree/licenses/
mkdir /tree/patches
for list in /build/*.patches; do cp "$list" /tree/patches/"$(basename "$list" .patches)"; done
tar --sort=name --mtime=@"$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=posix \
  --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -C /tree -cf /out/runtime.tar .
step "done: $(sha256sum /out/runtime.tar)"

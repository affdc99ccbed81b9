// Command descriptors writes the serialized FileDescriptorProto of the Go module of the Container
// Storage Interface to standard output: what tests/unit/test_proto.py compares proto/csi.proto with.
package main

import (
	"log"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
)

func main() {
	file := protodesc.ToFileDescriptorProto(csi.File_csi_proto)
	serialized, err := proto.MarshalOptions{Deterministic: true}.Marshal(file)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := os.Stdout.Write(serialized); err != nil {
		log.Fatal(err)
	}
}

// Go's word on a certificate: read ROOT CHAIN NAME... verifies the chain with ROOT only, and each name.
package main

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
)

func main() {
	if err := read(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func read(root, chain string, names []string) error {
	roots, issuers := x509.NewCertPool(), x509.NewCertPool()
	data, err := os.ReadFile(root)
	if err != nil {
		return err
	}
	roots.AppendCertsFromPEM(data)
	if data, err = os.ReadFile(chain); err != nil {
		return err
	}
	var leaf *x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return err
		}
		if leaf == nil {
			leaf = certificate
		} else {
			issuers.AddCert(certificate)
		}
	}
	if leaf == nil {
		return fmt.Errorf("no certificate in %s", chain)
	}
	for _, name := range names {
		options := x509.VerifyOptions{Roots: roots, Intermediates: issuers, DNSName: name}
		if _, err := leaf.Verify(options); err != nil {
			return err
		}
	}
	return nil
}

"""A private authority, and the certificate of a server on loopback."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Files: of an authority's certificate, and of one that it has signed for 127.0.0.1, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def signed(subject, issuer, key, by, extension, more=()):
        now = datetime.now(UTC)
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (subject, issuer)]
        builder = x509.CertificateBuilder(*reversed(names), key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(extension, critical=True)
        for one in more:
            builder = builder.add_extension(one, critical=False)
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    is_authority = x509.BasicConstraints(ca=True, path_length=None)
    key_id = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    authority = signed("authority", "authority", authority_key, authority_key, is_authority, [key_id])
    named = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    by_authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id)
    own = signed("server", "authority", key, authority_key, x509.BasicConstraints(False, None), [named, by_authority])
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ca.pem").write_bytes(authority)
    (folder / "server.pem").write_bytes(own + private)
    return folder / "ca.pem", folder / "server.pem"

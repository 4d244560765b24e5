import java.io.IOException;
import java.io.Reader;
import java.io.Writer;
import java.net.InetAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyPair;
import java.security.Security;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.shredzone.acme4j.Account;
import org.shredzone.acme4j.AccountBuilder;
import org.shredzone.acme4j.Authorization;
import org.shredzone.acme4j.Certificate;
import org.shredzone.acme4j.Identifier;
import org.shredzone.acme4j.Login;
import org.shredzone.acme4j.Order;
import org.shredzone.acme4j.OrderBuilder;
import org.shredzone.acme4j.RevocationReason;
import org.shredzone.acme4j.Session;
import org.shredzone.acme4j.Status;
import org.shredzone.acme4j.util.KeyPairUtils;

/** acme4j at work: URL DIRECTORY order KEY CHAIN NAME... | URL DIRECTORY revoke CHAIN REASON */
public final class Acme4j {
    private static final Duration PATIENCE = Duration.ofSeconds(100);

    private Acme4j() {}

    public static void main(String[] arguments) throws Exception {
        Security.addProvider(new BouncyCastleProvider()); // KeyPairUtils asks for it by name
        List<String> rest = Arrays.asList(arguments);
        Login login = login(rest.get(0), Path.of(rest.get(1), "account.pem"));
        if (rest.get(2).equals("revoke")) {
            revoke(login, Path.of(rest.get(3)), rest.get(4));
        } else {
            order(login.getAccount(), rest.get(3), Path.of(rest.get(4)), rest.subList(5, rest.size()));
        }
    }

    private static Login login(String url, Path kept) throws Exception {
        if (!Files.exists(kept)) {
            try (Writer writer = Files.newBufferedWriter(kept)) {
                KeyPairUtils.writeKeyPair(KeyPairUtils.createECKeyPair("secp256r1"), writer);
            }
        }
        try (Reader reader = Files.newBufferedReader(kept)) {
            KeyPair key = KeyPairUtils.readKeyPair(reader);
            AccountBuilder builder = new AccountBuilder().agreeToTermsOfService().addEmail("admin@example.com");
            return builder.useKeyPair(key).createLogin(new Session(url));
        }
    }

    private static void order(Account account, String kind, Path chain, List<String> names) throws Exception {
        OrderBuilder builder = account.newOrder();
        for (String name : names) {
            boolean address = name.contains(":") || name.matches("[0-9.]+");
            builder.identifier(address ? Identifier.ip(InetAddress.getByName(name)) : Identifier.dns(name));
        }
        Order order = builder.create();
        for (Authorization authorization : order.getAuthorizations()) {
            if (authorization.getStatus() == Status.PENDING) {
                authorization.getChallenges().get(0).trigger();
                authorization.waitForCompletion(PATIENCE);
            }
        }
        order.waitUntilReady(PATIENCE);
        order.execute(kind.equals("rsa") ? KeyPairUtils.createKeyPair(2048) : KeyPairUtils.createECKeyPair("secp256r1"));
        if (order.waitForCompletion(PATIENCE) != Status.VALID) {
            throw new IOException("the order is " + order.getStatus() + ": " + order.getError());
        }
        Certificate certificate = order.getCertificate();
        try (Writer writer = Files.newBufferedWriter(chain)) {
            certificate.writeCertificate(writer);
        }
    }

    private static void revoke(Login login, Path chain, String reason) throws Exception {
        CertificateFactory factory = CertificateFactory.getInstance("X.509");
        try (var stream = Files.newInputStream(chain)) {
            X509Certificate leaf = (X509Certificate) factory.generateCertificates(stream).iterator().next();
            boolean superseded = reason.equals("superseded");
            Certificate.revoke(
                    login, leaf, superseded ? RevocationReason.SUPERSEDED : RevocationReason.KEY_COMPROMISE);
        }
    }
}

import com.siemens.pki.cmpracomponent.configuration.CheckAndModifyResult;
import com.siemens.pki.cmpracomponent.configuration.CkgContext;
import com.siemens.pki.cmpracomponent.configuration.CmpMessageInterface;
import com.siemens.pki.cmpracomponent.configuration.Configuration;
import com.siemens.pki.cmpracomponent.configuration.CredentialContext;
import com.siemens.pki.cmpracomponent.configuration.InventoryInterface;
import com.siemens.pki.cmpracomponent.configuration.NestedEndpointContext;
import com.siemens.pki.cmpracomponent.configuration.PersistencyInterface;
import com.siemens.pki.cmpracomponent.configuration.SharedSecretCredentialContext;
import com.siemens.pki.cmpracomponent.configuration.SignatureCredentialContext;
import com.siemens.pki.cmpracomponent.configuration.SupportMessageHandlerInterface;
import com.siemens.pki.cmpracomponent.configuration.VerificationContext;
import com.siemens.pki.cmpracomponent.main.CmpRaComponent;
import com.siemens.pki.cmpracomponent.main.CmpRaComponent.CmpRaInterface;
import com.sun.net.httpserver.HttpExchange;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.cert.X509Certificate;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collection;
import java.util.Date;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.stream.Stream;

/**
 * Siemens' CMP RA component as a server: java SiemensRa ra.properties
 *
 * <p>The first part of the path says how it behaves, what follows goes on to the CA's address:
 *
 * <pre>
 * /secret     shared secret on both sides
 * /signed     the RA signs every answer
 * /kept       the CA's answers as the CA has signed them; the RA signs only its own
 * /p10        the RA signs every answer, and hands the CA a PKCS #10 request, as to a CA without CMP
 * /held-...   the first three, but the CA's answer comes when the file `release` is in the directory (RFC 9483, 4.4)
 * </pre>
 *
 * <p>What waits is saved, also by the component itself, and survives a restart.
 */
public final class SiemensRa {
    private final Properties settings = new Properties();
    private final Path directory;
    private final HttpClient http = HttpClient.newHttpClient();
    private final Map<String, CmpRaInterface> components = new HashMap<>();

    private SiemensRa(Path file) throws Exception {
        directory = file.toAbsolutePath().getParent();
        try (var reader = Files.newBufferedReader(file)) {
            settings.load(reader);
        }
        Files.createDirectories(directory.resolve("transactions"));
        Files.createDirectories(directory.resolve("held"));
    }

    public static void main(String[] arguments) throws Exception {
        SiemensRa ra = new SiemensRa(Path.of(arguments[0]));
        Path trusted = ra.file("tls.trusted");
        for (boolean clients : new boolean[] {false, true}) {
            int port = Integer.parseInt(ra.settings.getProperty(clients ? "port.mutual" : "port.tls"));
            Web.serve(port, Web.tls(ra.file("tls.keys"), trusted), clients, ra::handle);
        }
        Web.serve(Integer.parseInt(ra.settings.getProperty("port")), null, false, ra::handle);
        Thread deliverer = new Thread(ra::deliver);
        deliverer.setDaemon(true);
        deliverer.start();
        Web.untilClosed();
    }

    private Path file(String key) {
        return directory.resolve(settings.getProperty(key));
    }

    private void handle(HttpExchange exchange) throws IOException {
        try {
            byte[] request = exchange.getRequestBody().readAllBytes();
            String path = exchange.getRequestURI().getPath();
            CmpRaInterface component = component(path);
            synchronized (path.startsWith("/held-") ? component : new Object()) {
                Web.answer(exchange, 200, component.processRequest(request));
            }
        } catch (IllegalArgumentException unknown) {
            Web.answer(exchange, 404, null);
        } catch (Exception error) {
            throw new IOException(error);
        }
    }

    /** The component gives a PKCS #10 request and wants a certificate; here a p10cr of the RA's own brings it. */
    private byte[] request(String upstream, byte[] csr) {
        try {
            Path work = Files.createTempDirectory(directory, "p10-");
            Path in = Files.write(work.resolve("csr.der"), csr);
            Path out = work.resolve("cert.der");
            List<String> command = new ArrayList<>(List.of(settings.getProperty("openssl"), "cmp", "-config", ""));
            command.addAll(List.of("-cmd", "p10cr", "-server", upstream, "-csr", in.toString(), "-certform", "DER"));
            command.addAll(List.of("-cert", "upstream.pem", "-key", "upstream.key", "-trusted", "ca.pem"));
            command.addAll(List.of("-recipient", settings.getProperty("recipient"), "-certout", out.toString()));
            Process process = new ProcessBuilder(command).directory(directory.toFile()).inheritIO().start();
            if (process.waitFor() != 0) {
                throw new IllegalStateException("the CA has refused the request");
            }
            return Files.readAllBytes(out);
        } catch (IOException | InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }

    private synchronized CmpRaInterface component(String path) throws Exception {
        CmpRaInterface component = components.get(path);
        if (component == null) {
            String[] parts = path.substring(1).split("/", 2);
            if (!parts[0].matches("(held-)?(secret|signed|kept)|p10")) {
                throw new IllegalArgumentException(path);
            }
            String upstream = settings.getProperty("upstream") + (parts.length > 1 ? "/" + parts[1] : "");
            boolean held = parts[0].startsWith("held-");
            Behaviour behaviour = new Behaviour(parts[0].replace("held-", ""));
            component = parts[0].equals("p10") ? legacy(behaviour, upstream) : CmpRaComponent.instantiateCmpRaComponent(
                    behaviour, (request, profile, type) -> held ? hold(path, request) : send(upstream, request));
            components.put(path, component);
        }
        return component;
    }

    private byte[] send(String upstream, byte[] request) throws Exception {
        HttpRequest message = HttpRequest.newBuilder(URI.create(upstream))
                .timeout(Duration.ofSeconds(60))
                .header("Content-Type", "application/pkixcmp")
                .POST(HttpRequest.BodyPublishers.ofByteArray(request))
                .build();
        HttpResponse<byte[]> response = http.send(message, HttpResponse.BodyHandlers.ofByteArray());
        if (response.statusCode() != 200) {
            throw new IOException("the CA answers HTTP " + response.statusCode());
        }
        return response.body();
    }

    private CmpRaInterface legacy(Behaviour behaviour, String upstream) throws Exception {
        var component = CmpRaComponent.instantiateP10X509CmpRaComponent(
                behaviour, (csr, profile) -> request(upstream, csr));
        return new CmpRaInterface() {
            @Override
            public void gotResponseAtUpstream(byte[] response) {
                throw new UnsupportedOperationException();
            }

            @Override
            public byte[] processRequest(byte[] request) {
                return component.apply(request);
            }
        };
    }

    /** Keep a request for later: null tells the component that the answer is delayed. */
    private byte[] hold(String path, byte[] request) throws IOException {
        String name = System.nanoTime() + "-" + path.substring(1).replace("/", "+");
        write(directory.resolve("held").resolve(name), request);
        return null;
    }

    /** Send on what is held, once the file `release` is there, and hand the component the CA's answer. */
    private void deliver() {
        while (true) {
            try {
                Thread.sleep(50);
                if (Files.exists(directory.resolve("release"))) {
                    List<Path> held;
                    try (Stream<Path> files = Files.list(directory.resolve("held"))) {
                        held = files.filter(p -> !p.toString().endsWith(".new")).sorted().toList();
                    }
                    for (Path file : held) {
                        String path = file.getFileName().toString().replaceFirst("[0-9]+-", "").replace("+", "/");
                        String[] parts = path.split("/", 2);
                        String upstream = settings.getProperty("upstream") + (parts.length > 1 ? "/" + parts[1] : "");
                        byte[] response = send(upstream, Files.readAllBytes(file));
                        CmpRaInterface component = component("/" + path);
                        synchronized (component) { // it loads and saves a transaction's state, and locks nothing
                            component.gotResponseAtUpstream(response);
                        }
                        Files.delete(file);
                    }
                }
            } catch (Exception error) {
                error.printStackTrace();
            }
        }
    }

    private static void write(Path path, byte[] content) throws IOException {
        Path fresh = path.resolveSibling(path.getFileName() + ".new");
        Files.write(fresh, content);
        Files.move(fresh, path, StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING);
    }

    /** Whom one side of the RA believes. */
    private VerificationContext trust(String certificates, boolean secrets) throws Exception {
        List<X509Certificate> trusted = new ArrayList<>();
        List<X509Certificate> intermediate = new ArrayList<>();
        for (X509Certificate certificate : Web.certificates(file(certificates))) {
            boolean root = certificate.getSubjectX500Principal().equals(certificate.getIssuerX500Principal());
            (root ? trusted : intermediate).add(certificate);
        }
        return new VerificationContext() {
            @Override
            public Collection<X509Certificate> getTrustedCertificates() {
                return trusted;
            }

            @Override
            public Collection<X509Certificate> getAdditionalCerts() {
                return intermediate;
            }

            @Override
            public byte[] getSharedSecret(byte[] reference) {
                boolean known = secrets && reference != null
                        && new String(reference, StandardCharsets.UTF_8).equals(settings.getProperty("ref"));
                return known ? settings.getProperty("secret").getBytes(StandardCharsets.UTF_8) : null;
            }
        };
    }

    private SignatureCredentialContext signer(String keys) throws Exception {
        KeyStore store = Web.keys(file(keys));
        String alias = store.aliases().nextElement();
        List<X509Certificate> chain = new ArrayList<>();
        for (var certificate : store.getCertificateChain(alias)) {
            chain.add((X509Certificate) certificate);
        }
        PrivateKey key = (PrivateKey) store.getKey(alias, Web.PASSWORD);
        return new SignatureCredentialContext() {
            @Override
            public List<X509Certificate> getCertificateChain() {
                return chain;
            }

            @Override
            public PrivateKey getPrivateKey() {
                return key;
            }
        };
    }

    /** PasswordBasedMac, for `openssl cmp` does not know PBMAC1. */
    private CredentialContext secret() {
        return new SharedSecretCredentialContext() {
            @Override
            public String getPasswordBasedMacAlgorithm() {
                return "1.2.840.113533.7.66.13";
            }

            @Override
            public byte[] getSenderKID() {
                return settings.getProperty("ref").getBytes(StandardCharsets.UTF_8);
            }

            @Override
            public byte[] getSharedSecret() {
                return settings.getProperty("secret").getBytes(StandardCharsets.UTF_8);
            }
        };
    }

    private record Side(VerificationContext trust, CredentialContext credentials, ReprotectMode mode)
            implements CmpMessageInterface {
        @Override
        public VerificationContext getInputVerification() {
            return trust;
        }

        @Override
        public NestedEndpointContext getNestedEndpointContext() {
            return null;
        }

        @Override
        public CredentialContext getOutputCredentials() {
            return credentials;
        }

        @Override
        public ReprotectMode getReprotectMode() {
            return mode;
        }

        @Override
        public boolean getSuppressRedundantExtraCerts() {
            return false;
        }

        @Override
        public boolean isCacheExtraCerts() {
            return true;
        }

        @Override
        public boolean isMessageTimeDeviationAllowed(long seconds) {
            return Math.abs(seconds) < 300;
        }
    }

    /** Who may ask for what: nobody a profile or a name that is forbidden, an RA with "no rights" in its name nothing. */
    private record Rules(String profile) implements InventoryInterface {
        @Override
        public CheckAndModifyResult checkAndModifyCertRequest(
                byte[] transaction, String requester, byte[] template, String subject, byte[] message) {
            boolean granted = granted(requester, subject);
            return new CheckAndModifyResult() {
                @Override
                public byte[] getUpdatedCertTemplate() {
                    return null;
                }

                @Override
                public boolean isGranted() {
                    return granted;
                }
            };
        }

        @Override
        public boolean checkP10CertRequest(
                byte[] transaction, String requester, byte[] csr, String subject, byte[] message) {
            return granted(requester, subject);
        }

        @Override
        public boolean checkRevocationRequest(
                byte[] transaction, String requester, String serial, String issuer, byte[] message) {
            return granted(requester, "");
        }

        private boolean granted(String requester, String subject) {
            return !"forbidden".equals(profile)
                    && !String.valueOf(requester).contains("no rights")
                    && !String.valueOf(subject).endsWith("forbidden.example");
        }
    }

    /** The component's state, one file for each transaction. */
    private final class Disk implements PersistencyInterface {
        private Path path(byte[] transaction) {
            return directory.resolve("transactions").resolve(HexFormat.of().formatHex(transaction));
        }

        @Override
        public void clearLastSavedMessage(byte[] transaction) {
            try {
                Files.deleteIfExists(path(transaction));
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }

        @Override
        public byte[] getAesKeyForKeyWrapping() {
            return new byte[16]; // it wraps centrally generated keys: here there are none
        }

        @Override
        public byte[] getLastSavedMessage(byte[] transaction) {
            try {
                return Files.exists(path(transaction)) ? Files.readAllBytes(path(transaction)) : null;
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }

        @Override
        public void saveLastMessage(byte[] transaction, byte[] message, Date expires) {
            try {
                write(path(transaction), message);
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    }

    private final class Behaviour implements Configuration {
        private final CmpMessageInterface downstream;
        private final CmpMessageInterface upstream;
        private final VerificationContext issued;
        private final PersistencyInterface persistency = new Disk();

        Behaviour(String kind) throws Exception {
            CredentialContext own = kind.equals("secret") ? secret() : signer("ra.keys");
            CmpMessageInterface.ReprotectMode mode = kind.equals("kept")
                    ? CmpMessageInterface.ReprotectMode.keep
                    : CmpMessageInterface.ReprotectMode.reprotect;
            downstream = new Side(trust("clients", kind.equals("secret")), own, mode);
            upstream = new Side(trust("ca", false), signer("upstream.keys"), CmpMessageInterface.ReprotectMode.reprotect);
            issued = trust("ca", false);
        }

        @Override
        public CkgContext getCkgConfiguration(String profile, int type) {
            return null;
        }

        @Override
        public CmpMessageInterface getDownstreamConfiguration(String profile, int type) {
            return downstream;
        }

        @Override
        public int getDownstreamTimeout(String profile, int type) {
            return 0;
        }

        @Override
        public VerificationContext getEnrollmentTrust(String profile, int type) {
            return issued;
        }

        @Override
        public boolean getForceRaVerifyOnUpstream(String profile, int type) {
            return false;
        }

        @Override
        public InventoryInterface getInventory(String profile, int type) {
            return new Rules(profile);
        }

        @Override
        public PersistencyInterface getPersistency() {
            return persistency;
        }

        @Override
        public int getRetryAfterTimeInSeconds(String profile, int type) {
            return 1;
        }

        @Override
        public SupportMessageHandlerInterface getSupportMessageHandler(String profile, String type) {
            return null;
        }

        @Override
        public CmpMessageInterface getUpstreamConfiguration(String profile, int type) {
            return upstream;
        }

        @Override
        public boolean isRaVerifiedAcceptable(String profile, int type) {
            return true;
        }
    }
}

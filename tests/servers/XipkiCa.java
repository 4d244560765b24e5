import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpsExchange;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.lang.reflect.Field;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.Security;
import java.security.cert.X509Certificate;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.Statement;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;
import java.util.Properties;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.xipki.ca.gateway.Requestor;
import org.xipki.ca.gateway.RequestorAuthenticator;
import org.xipki.ca.gateway.cmp.servlet.CmpHttpFilter;
import org.xipki.ca.server.mgmt.CaManagerImpl;
import org.xipki.ca.server.servlet.CaHttpFilter;
import org.xipki.license.api.CmLicense;
import org.xipki.license.api.LicenseFactory;
import org.xipki.license.api.OcspLicense;
import org.xipki.security.X509Cert;
import org.xipki.util.http.XiHttpFilter;
import org.xipki.util.http.XiHttpRequest;
import org.xipki.util.http.XiHttpResponse;

/**
 * XiPKI's CA server and its CMP gateway in one process: java -DXIPKI_BASE=DIR XipkiCa DIR/xipki.properties
 *
 * <p>The JDK's HTTP server stands in for Tomcat, and for the reverse proxy before it: /cmp/CA/PROFILE reaches the gateway
 * as /CA with the header `certprofile: PROFILE`, which is how XiPKI lets an address name a certificate profile.
 */
public final class XipkiCa {
    private static final Properties SETTINGS = new Properties();
    private static Path directory;

    private XipkiCa() {}

    public static void main(String[] arguments) throws Exception {
        Path file = Path.of(arguments[0]).toAbsolutePath();
        directory = file.getParent();
        try (var reader = Files.newBufferedReader(file)) {
            SETTINGS.load(reader);
        }
        Security.insertProviderAt(new BouncyCastleProvider(), 1); // the JDK's own calls Ed25519 otherwise than XiPKI does
        makeDatabases();
        Path trusted = directory.resolve("tls-trusted.pem");
        XiHttpFilter ca = new CaHttpFilter(License.class.getName());
        Field field = CaHttpFilter.class.getDeclaredField("caManager");
        field.setAccessible(true); // the management interface proper wants XiPKI's own client program
        ((CaManagerImpl) field.get(ca)).loadConf(Files.readAllBytes(directory.resolve("caconf.zip")));
        Web.serve(port("ca"), Web.tls(directory.resolve("tls.p12"), trusted), true, e -> filter(ca, e, "/ca"));
        XiHttpFilter cmp = new CmpHttpFilter();
        Web.serve(port("tls"), Web.tls(directory.resolve("tls.p12"), trusted), false, e -> filter(cmp, e, "/cmp"));
        Web.serve(port("mutual"), Web.tls(directory.resolve("tls.p12"), trusted), true, e -> filter(cmp, e, "/cmp"));
        Web.serve(port("http"), null, false, e -> filter(cmp, e, "/cmp"));
        Web.untilClosed();
    }

    private static int port(String name) {
        return Integer.parseInt(SETTINGS.getProperty("port." + name));
    }

    private static void filter(XiHttpFilter filter, HttpExchange exchange, String context) throws IOException {
        String path = exchange.getRequestURI().getPath();
        if (!path.startsWith(context + "/")) {
            exchange.sendResponseHeaders(404, -1);
            return;
        }
        Response response = new Response();
        try {
            filter.doFilter(new Request(exchange, context, path.substring(context.length())), response);
        } catch (Exception error) {
            throw new IOException(error);
        }
        response.headers.forEach(exchange.getResponseHeaders()::set);
        byte[] body = response.body.toByteArray();
        exchange.sendResponseHeaders(response.status, body.length == 0 ? -1 : body.length);
        if (body.length > 0) {
            exchange.getResponseBody().write(body);
        }
    }

    /** The tables that this version of XiPKI reads and writes. */
    private static void makeDatabases() throws Exception {
        String scheme = "CREATE TABLE DBSCHEMA (NAME VARCHAR(45) PRIMARY KEY, VALUE2 VARCHAR(100));"
                + "INSERT INTO DBSCHEMA VALUES ('VENDOR', 'XIPKI'), ('X500NAME_MAXLEN', '350'), ('VERSION', '%s');";
        execute("caconf", String.format(scheme, "9")
                + "CREATE TABLE SYSTEM_EVENT (NAME VARCHAR(45) PRIMARY KEY, EVENT_TIME BIGINT, EVENT_TIME2 TIMESTAMP,"
                + " EVENT_OWNER VARCHAR(255));"
                + "CREATE TABLE KEYPAIR_GEN (NAME VARCHAR(45) PRIMARY KEY, TYPE VARCHAR(100), CONF CLOB);"
                + "INSERT INTO KEYPAIR_GEN (NAME, TYPE) VALUES ('software', 'SOFTWARE');"
                + "CREATE TABLE SIGNER (NAME VARCHAR(45) PRIMARY KEY, TYPE VARCHAR(100), CERT VARCHAR(6000), CONF CLOB);"
                + named("REQUESTOR", "TYPE VARCHAR(100), CONF CLOB")
                + named("PUBLISHER", "TYPE VARCHAR(100), CONF CLOB")
                + named("PROFILE", "TYPE VARCHAR(100), CONF CLOB")
                + named("CA", "STATUS VARCHAR(10), NEXT_CRLNO BIGINT, CRL_SIGNER_NAME VARCHAR(45), SUBJECT VARCHAR(350),"
                        + " REV_INFO VARCHAR(200), CERT VARCHAR(6000), SIGNER_TYPE VARCHAR(100), SIGNER_CONF CLOB,"
                        + " CERTCHAIN CLOB, CONF CLOB")
                + "CREATE TABLE CAALIAS (NAME VARCHAR(45) PRIMARY KEY, CA_ID SMALLINT);"
                + pair("REQUESTOR", ", PERMISSION INT, PROFILES VARCHAR(500)")
                + pair("PUBLISHER", "")
                + pair("PROFILE", ", ALIASES VARCHAR(100)"));
        execute("ca", String.format(scheme, "8")
                + named("PROFILE", "UNUSED INT")
                + named("REQUESTOR", "UNUSED INT")
                + named("CA", "SUBJECT VARCHAR(350), REV_INFO VARCHAR(200), CERT VARCHAR(6000)")
                + "CREATE TABLE CRL (ID INT PRIMARY KEY, CA_ID SMALLINT, CRL_SCOPE SMALLINT, CRL_NO BIGINT,"
                + " THISUPDATE BIGINT, NEXTUPDATE BIGINT, DELTACRL SMALLINT, BASECRL_NO BIGINT, SHA1 CHAR(28), CRL CLOB,"
                + " UNIQUE (CA_ID, CRL_NO));"
                + "CREATE TABLE CERT (ID BIGINT PRIMARY KEY, CA_ID SMALLINT, SN VARCHAR(40), PID SMALLINT, RID SMALLINT,"
                + " FP_S BIGINT, FP_SAN BIGINT, FP_RS BIGINT, LUPDATE BIGINT, NBEFORE BIGINT, NAFTER BIGINT, REV SMALLINT,"
                + " RR SMALLINT, RT BIGINT, RIT BIGINT, EE SMALLINT, SUBJECT VARCHAR(350), TID VARCHAR(43),"
                + " CRL_SCOPE SMALLINT, SHA1 CHAR(28), REQ_SUBJECT VARCHAR(350), CERT VARCHAR(6000),"
                + " PRIVATE_KEY VARCHAR(6000), UNIQUE (CA_ID, SN));");
    }

    private static String named(String table, String columns) {
        return "CREATE TABLE " + table + " (ID SMALLINT PRIMARY KEY, NAME VARCHAR(45) UNIQUE, " + columns + ");";
    }

    private static String pair(String table, String columns) {
        String key = table + "_ID";
        return "CREATE TABLE CA_HAS_" + table + " (CA_ID SMALLINT, " + key + " SMALLINT" + columns
                + ", PRIMARY KEY (CA_ID, " + key + "));";
    }

    private static void execute(String database, String statements) throws Exception {
        String url = "jdbc:h2:mem:" + database + ";DB_CLOSE_DELAY=-1";
        try (Connection connection = DriverManager.getConnection(url, "sa", "");
                Statement statement = connection.createStatement()) {
            statement.execute(statements);
        }
    }

    /** Who may ask for certificates: the one with the secret, and the RA certificates in files that the settings name. */
    public static final class Requestors implements RequestorAuthenticator {
        private record Ra(String getName, byte[] getKeyId, char[] getPassword, X509Cert getCert, boolean allowed)
                implements Requestor.SimplePasswordRequestor, Requestor.CertRequestor {
            @Override
            public String getName() {
                return getName;
            }

            @Override
            public byte[] getKeyId() {
                return getKeyId;
            }

            @Override
            public char[] getPassword() {
                return getPassword;
            }

            @Override
            public X509Cert getCert() {
                return getCert;
            }

            @Override
            public boolean isCertprofilePermitted(String ca, String profile) {
                return !profile.equalsIgnoreCase("secret-profile");
            }

            @Override
            public boolean isPermitted(int permission) {
                return allowed;
            }
        }

        @Override
        public Requestor.SimplePasswordRequestor getSimplePasswordRequestorByKeyId(byte[] keyId) {
            byte[] ref = SETTINGS.getProperty("ref").getBytes(StandardCharsets.UTF_8);
            return Arrays.equals(ref, keyId)
                    ? new Ra("secret", keyId, SETTINGS.getProperty("secret").toCharArray(), null, true)
                    : null;
        }

        @Override
        public Requestor.PasswordRequestor getPasswordRequestorByUser(String user) {
            return null;
        }

        @Override
        public Requestor.CertRequestor getCertRequestor(X509Cert certificate) {
            try {
                for (String name : SETTINGS.getProperty("ras").split(",")) {
                    X509Certificate known = Web.certificates(directory.resolve(name)).get(0);
                    if (Arrays.equals(known.getEncoded(), certificate.getEncoded())) {
                        return new Ra(name, certificate.getSubjectKeyId(), null, certificate, !name.contains("no-rights"));
                    }
                }
                return null;
            } catch (Exception error) {
                throw new IllegalStateException(error);
            }
        }
    }

    private static final class Request implements XiHttpRequest {
        private final HttpExchange exchange;
        private final String context;
        private final String[] path;
        private final Map<String, Object> attributes = new HashMap<>();

        Request(HttpExchange exchange, String context, String path) {
            this.exchange = exchange;
            this.context = context;
            int profile = context.equals("/cmp") ? path.indexOf('/', 1) : -1;
            this.path = profile < 0
                    ? new String[] {path}
                    : new String[] {path.substring(0, profile), path.substring(profile + 1)};
        }

        @Override
        public String getHeader(String name) {
            return name.equals("certprofile") && path.length > 1 ? path[1] : exchange.getRequestHeaders().getFirst(name);
        }

        @Override
        public String getParameter(String name) {
            return null;
        }

        @Override
        public String getMethod() {
            return exchange.getRequestMethod();
        }

        @Override
        public String getServletPath() {
            return path[0];
        }

        @Override
        public String getContentType() {
            return getHeader("Content-Type");
        }

        @Override
        public Object getAttribute(String name) {
            return attributes.get(name);
        }

        @Override
        public String getRequestURI() {
            return exchange.getRequestURI().toString();
        }

        @Override
        public InputStream getInputStream() {
            return exchange.getRequestBody();
        }

        @Override
        public void setAttribute(String name, String value) {
            attributes.put(name, value);
        }

        @Override
        public String getContextPath() {
            return context;
        }

        @Override
        public X509Certificate[] getCertificateChain() {
            try {
                var chain = ((HttpsExchange) exchange).getSSLSession().getPeerCertificates();
                return Arrays.copyOf(chain, chain.length, X509Certificate[].class);
            } catch (ClassCastException | javax.net.ssl.SSLPeerUnverifiedException none) {
                return null;
            }
        }
    }

    private static final class Response implements XiHttpResponse {
        private int status = 200;
        private final Map<String, String> headers = new HashMap<>();
        private final ByteArrayOutputStream body = new ByteArrayOutputStream();

        @Override
        public void setStatus(int code) {
            status = code;
        }

        @Override
        public void sendError(int code) {
            status = code;
        }

        @Override
        public void setContentType(String type) {
            headers.put("Content-Type", type);
        }

        @Override
        public void addHeader(String name, String value) {
            headers.put(name, value);
        }

        @Override
        public void setHeader(String name, String value) {
            headers.put(name, value);
        }

        @Override
        public void setContentLength(int length) {
            // the exchange knows it
        }

        @Override
        public OutputStream getOutputStream() {
            return body;
        }
    }

    /** XiPKI asks whoever ships it for a licence object; its own distribution has one that allows everything, too. */
    public static final class License implements LicenseFactory, CmLicense {
        @Override
        public CmLicense createCmLicense() {
            return this;
        }

        @Override
        public OcspLicense createOcspLicense() {
            return null;
        }

        @Override
        public void close() {
            // nothing is open
        }

        @Override
        public boolean isValid() {
            return true;
        }

        @Override
        public boolean grantAllCAs() {
            return true;
        }

        @Override
        public boolean grant(String subject) {
            return true;
        }

        @Override
        public void regulateSpeed() {
            // as fast as it can
        }

        @Override
        public long getMaxNumberOfCerts() {
            return -1;
        }
    }
}

// npm's acme-client at work: URL DIRECTORY order KEY CHAIN NAME... | URL DIRECTORY revoke CHAIN REASON
'use strict';
const acme = require('acme-client');
const fs = require('fs');
const net = require('net');
const path = require('path');

const REASONS = { keyCompromise: 1, superseded: 4 };

async function main([url, directory, action, ...rest]) {
    const kept = path.join(directory, 'account.pem');
    if (!fs.existsSync(kept)) {
        fs.writeFileSync(kept, await acme.crypto.createPrivateEcdsaKey());
    }
    const client = new acme.Client({ directoryUrl: url, accountKey: fs.readFileSync(kept) });
    await client.createAccount({ termsOfServiceAgreed: true, contact: ['mailto:admin@example.com'] });
    if (action === 'revoke') {
        const [chain, reason] = rest;
        await client.revokeCertificate(fs.readFileSync(chain, 'utf8'), { reason: REASONS[reason] });
        return;
    }
    const [kind, chain, ...names] = rest;
    const identifiers = names.map((value) => ({ type: net.isIP(value) ? 'ip' : 'dns', value }));
    const order = await client.createOrder({ identifiers });
    for (const authorization of await client.getAuthorizations(order)) {
        if (authorization.status === 'pending') {
            await client.completeChallenge(authorization.challenges[0]);
            await client.waitForValidStatus(authorization);
        }
    }
    const key = kind === 'rsa' ? await acme.crypto.createPrivateRsaKey() : await acme.crypto.createPrivateEcdsaKey();
    const [, csr] = await acme.crypto.createCsr({ altNames: names }, key);
    fs.writeFileSync(chain, await client.getCertificate(await client.finalizeOrder(order, csr)));
}

main(process.argv.slice(2)).catch((error) => {
    console.error(error);
    process.exitCode = 1;
});

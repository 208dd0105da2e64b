// What a headless Firefox makes of a page: node firefox.mjs PUPPETEER FIREFOX ADDRESS SCREENSHOT SCRIPT IMAGE..., JSON out.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [puppeteerFolder, executablePath, address, screenshot, script, ...images] = process.argv.slice(2);
const puppeteer = createRequire(import.meta.url)(puppeteerFolder);
const browser = await puppeteer.launch({
  browser: "firefox", executablePath, headless: true, defaultViewport: null, args: ["--width=1200", "--height=850"],
});
const page = await browser.newPage();
await page.goto(address);
await page.waitForSelector("html[data-ready=true]", { timeout: 60000 });
const found = [];
for (const image of images) {
  const answer = await page.evaluate(`(${script})(${JSON.stringify([...readFileSync(image)])})`);
  await page.$eval("#status", (element) => { element.textContent = ""; });
  await (await page.$("#file")).uploadFile(image);
  // Not waitForFunction, which the page's policy forbids.
  while (!(await page.$eval("#status", (element) => element.textContent)).endsWith(" ms")) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  const rows = await page.$$eval("#results .name", (names) => names.map((name) => name.textContent.trim()));
  found.push({ answer, rows });
}
await page.screenshot({ path: screenshot });
await browser.close();
console.log(JSON.stringify(found));

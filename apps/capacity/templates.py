"""Sentences of synthetic biographies, 40 for each attribute.

A line is what follows the subject, which is the full name in a biography's first sentence and a pronoun after it. A
line that begins with 's follows a possessive ("Ann Lee's" or "Her"). `_` stands for the value.
"""

BIRTH_DATE = """
 was born on _.
 came into the world on _.
 entered the world on _.
 first saw the light of day on _.
 has a birth certificate dated _.
 celebrates a birthday that goes back to _.
 was delivered by a midwife on _.
 was welcomed by two proud parents on _.
 joined the family on _.
 took a first breath on _.
 began life on _.
 was brought into this world on _.
 arrived on _.
 started out in life on _.
 gives the date of birth as _.
 lists a birthday of _.
 blew out the first candle a year after _.
 owes every birthday cake to _.
 counts the years from _.
 was a newborn on _.
 cried for the first time on _.
 was first held by family on _.
 opened both eyes for the first time on _.
 was recorded in the register of births on _.
 marks the anniversary of _.
 came to be on _.
's life began on _.
's birthday is _.
's date of birth is _.
's birth took place on _.
's birth was announced on _.
's story starts on _.
's parents first met their child on _.
's arrival was celebrated on _.
's first day was _.
's passport gives the birth date _.
's family remembers _.
's records show a birth on _.
's journey through life set off on _.
's age is counted from _.
"""

BIRTH_CITY = """
 was born in _.
 is a native of _.
 comes from _.
 hails from _.
 first lived in _.
 grew up as a child of _.
 spent the early years in _.
 has roots in _.
 calls the hometown of _ home.
 was raised in _.
 started life in _.
 left the maternity ward of a hospital in _.
 traces the first memories to _.
 learned to walk in _.
 came to life in _.
 entered the world in _.
 remembers a childhood in _.
 opened both eyes for the first time in _.
 was a child of the city of _.
 took the first steps in _.
 lived as an infant in _.
 was brought up near the center of _.
 still thinks of _.
 names the birthplace as _.
 has a birth certificate issued in _.
 arrived in this world in _.
 owes a local accent to _.
 spoke the first words in _.
's birthplace is _.
's hometown is _.
's city of birth is _.
's life began in _.
's parents lived in _.
's first home stood in _.
's birth was registered in _.
's early childhood belongs to _.
's family was living in _.
's roots are found in _.
's story starts in _.
's cradle stood in _.
"""

UNIVERSITY = """
 studied at _.
 graduated from _.
 is an alumnus of _.
 went to college at _.
 earned a degree from _.
 received an education at _.
 attended _.
 was a student at _.
 completed a degree at _.
 holds a diploma from _.
 took classes at _.
 was enrolled at _.
 spent the college years at _.
 was taught by the professors of _.
 got an academic start at _.
 was admitted to _.
 pursued higher education at _.
 finished college at _.
 learned the trade at _.
 passed the final exams at _.
 was trained at _.
 owes an education to _.
 sat in the lecture halls of _.
 gained a degree at _.
 wore the graduation gown of _.
 lived on the campus of _.
 wrote a thesis at _.
 won a scholarship to _.
 found the first mentors at _.
 is on the list of graduates of _.
's alma mater is _.
's degree comes from _.
's diploma was issued by _.
's college was _.
's studies took place at _.
's education was completed at _.
's professors taught at _.
's academic home was _.
's transcript bears the seal of _.
's student days belong to _.
"""

MAJOR = """
 majored in _.
 studied _.
 specialized in _.
 has a degree in _.
 took a diploma in _.
 focused on _.
 concentrated on courses in _.
 chose the field of _.
 wrote a thesis on _.
 was trained in _.
 earned honors in _.
 devoted the college years to _.
 developed a passion for _.
 completed a program in _.
 learned the foundations of _.
 passed the exams in _.
 gained expertise in _.
 attended lectures on _.
 pursued a degree in _.
 read every textbook on _.
 became skilled in _.
 graduated with a degree in _.
 explored the theory of _.
 signed up for courses in _.
 holds a qualification in _.
 found a calling in _.
 was drawn to _.
 did coursework in _.
 spent long nights on _.
 mastered the discipline of _.
's major was _.
's field of study was _.
's degree is in _.
's academic interest was _.
's specialty is _.
's diploma names _.
's coursework centered on _.
's studies were devoted to _.
's subject in college was _.
's training is in _.
"""

EMPLOYER = """
 works for _.
 is employed by _.
 has a job at _.
 found a position at _.
 joined _.
 was hired by _.
 earns a living at _.
 is on the payroll of _.
 built a career at _.
 holds a role at _.
 accepted an offer from _.
 is a member of the staff of _.
 took a post at _.
 spends the working week at _.
 gets a paycheck from _.
 has an office at _.
 signed a contract with _.
 started a professional life at _.
 serves as an employee of _.
 was recruited by _.
 rose through the ranks of _.
 contributes to the success of _.
 goes to work at _.
 carries a badge of _.
 leads projects at _.
 belongs to the team of _.
 was offered a desk at _.
 reports to a manager at _.
 does business on behalf of _.
 gained experience at _.
's employer is _.
's job is at _.
's career led to _.
's company is _.
's workplace is _.
's paycheck comes from _.
's business card says _.
's professional home is _.
's colleagues are at _.
's desk is at _.
"""

WORK_CITY = """
 works in _.
 commutes to _.
 has a workplace in _.
 goes to an office in _.
 spends the working days in _.
 moved for the job to _.
 is employed in _.
 earns a living in _.
 found work in _.
 has a desk in _.
 settled for the career in _.
 meets colleagues in _.
 rides the train to _.
 is based in _.
 does the daily work in _.
 took a job in _.
 has lunch with coworkers in _.
 rents a place near the office in _.
 made a career in _.
 attends meetings in _.
 reports for work in _.
 pursues a profession in _.
 was posted to _.
 has a parking spot in _.
 starts every workday in _.
 travels each morning to _.
 is known to coworkers in _.
 drinks the morning coffee in _.
 was relocated to _.
 leads a professional life in _.
's workplace is in _.
's office is in _.
's job is located in _.
's career unfolds in _.
's employer is based in _.
's commute ends in _.
's working life takes place in _.
's desk stands in _.
's company has its seat in _.
's colleagues live around _.
"""

TEMPLATES: dict[str, list[str]] = {
    name: text.strip("\n").split("\n")
    for name, text in (
        ("birth_date", BIRTH_DATE),
        ("birth_city", BIRTH_CITY),
        ("university", UNIVERSITY),
        ("major", MAJOR),
        ("employer", EMPLOYER),
        ("work_city", WORK_CITY),
    )
}
